"""A benchmark: its settings and what it measures. Running one, its result file and its tables are the same for all."""

from __future__ import annotations

import dataclasses
import enum
import json
import shlex
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from bench.harness.flags import parse_settings
from bench.harness.machine import REPOSITORY, current_commit
from bench.harness.provenance import provenance, provenance_lines
from bench.harness.tables import ResultTable, markdown_table
from easyspec.cli.event_loop import run_until_signal

S = TypeVar("S")


@dataclass(frozen=True)
class Findings:
    """What a run found: `content` goes into the result file, tables and notes to the reader. `checkpoints` are the
    measured models. Without tables the whole result is printed."""

    content: Mapping[str, Any]
    tables: Sequence[ResultTable] = ()
    notes: Sequence[str] = ()
    checkpoints: Sequence[Path] = ()
    exit_code: int = 0


@dataclass(frozen=True)
class Benchmark(Generic[S]):
    """`command` is what its documentation says is typed. Markdown goes with the provenance, to be kept as it is."""

    command: str
    about: str
    settings: type[S]
    measure: Callable[[S, Console], Findings | Awaitable[Findings]]
    is_markdown: bool = False

    def main(self, argv: Sequence[str]) -> int:
        """Measure as `argv` says; returns the exit code, or 128 + the number of a signal that came. Raises
        EasyspecError if the services do not come up or fail, SystemExit for bad flags."""
        settings, path = parse_settings(self.settings, self.command, self.about, argv)
        console, commit = Console(), current_commit()
        outcome = self.measure(settings, console)
        if not isinstance(outcome, Findings):
            measuring, outcomes = outcome, []

            async def run() -> None:
                outcomes.append(await measuring)

            if interrupted := run_until_signal(run()):
                return interrupted
            (outcome,) = outcomes
        command = shlex.join([*self.command.split(), *argv])
        report = {
            "command": command,
            **provenance(outcome.checkpoints, commit),
            "settings": as_plain(settings),
            **as_plain(outcome.content),
        }
        if outcome.content and not outcome.tables:
            print(json.dumps(report, indent=1))
        elif self.is_markdown:
            print("\n".join(provenance_lines(report)))
            for table in outcome.tables:
                print(f"\n{table.title}\n\n{markdown_table(table.columns, table.rows)}")
        else:
            for table in outcome.tables:
                table.print(console)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            console.print(f"written to {path}", soft_wrap=True)
        for note in outcome.notes:
            console.print(note, highlight=False, soft_wrap=True)
        return outcome.exit_code


def as_plain(value: Any) -> Any:
    """As JSON has it: dataclasses as objects, enums by value, paths as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: as_plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_plain(each) for each in value]
    if isinstance(value, enum.Enum):
        return as_plain(value.value)
    if isinstance(value, Path):  # a result file says nothing about the machine's folders
        return str(value.relative_to(REPOSITORY) if value.is_relative_to(REPOSITORY) else value)
    return value
