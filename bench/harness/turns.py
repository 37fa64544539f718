"""Ways that are compared take turns, so that whatever slows the machine down for a while slows all of them alike."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
R = TypeVar("R")


def rotated(ways: Sequence[T], turn: int) -> list[T]:
    """The ways in the order of a turn: each is first, second and last equally often."""
    shift = turn % len(ways)
    return [*ways[shift:], *ways[:shift]]


def progress_on(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


async def one_by_one(
    planned: Sequence[T], say: Callable[[T], str], complete: Callable[[T], Awaitable[R]], progress: Progress
) -> list[R]:
    bar = progress.add_task("", total=len(planned))
    found = []
    for each in planned:
        progress.update(bar, description=say(each))
        found.append(await complete(each))
        progress.advance(bar)
    return found
