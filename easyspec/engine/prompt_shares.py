"""Whose prompt is read in a step, and how much of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from easyspec.engine.prefill_pace import MIN_PROMPT_ROWS
from easyspec.model.kv_cache import KvMemory, SessionSlots


class Reader(Protocol):
    """A session with tokens to compute; one that does not take prefixes computes them whatever is cached."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def slots(self) -> SessionSlots: ...
    @property
    def takes_prefixes(self) -> bool: ...


ReaderT = TypeVar("ReaderT", bound=Reader)


def served_readers(readers: Sequence[ReaderT], memory: KvMemory, num_rows: int) -> list[ReaderT]:
    """The first of `readers` that get at least a few of `num_rows` rows each.

    If two are about to compute the same tokens, the later one waits a step, and finds them cached.
    """
    chosen: dict[object, ReaderT] = {}
    for reader in readers:
        has_twin = memory.shares_prefixes and reader.takes_prefixes
        next_token_id = reader.token_ids[reader.slots.num_cached]
        chosen.setdefault((id(reader.slots.prefix), next_token_id) if has_twin else id(reader), reader)
    return [*chosen.values()][: max(1, num_rows // MIN_PROMPT_ROWS)]


def share_out(
    readers: Sequence[ReaderT], num_rows: int, num_unread: Callable[[ReaderT], int], give: Callable[[ReaderT, int], int]
) -> None:
    """Give each of `readers` a fair share of the rows, the shortest prompt first: what it leaves goes to longer ones.

    `give` takes a reader and its tokens, and says how many rows they took; it may look no further than that.
    """
    for index, reader in enumerate(sorted(readers, key=num_unread)):
        num_rows -= give(reader, min(num_unread(reader), num_rows // (len(readers) - index)))
