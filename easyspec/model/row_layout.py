"""Which rows a forward pass computes and which cached tokens each of them sees.

Dimensions: `T` rows of the pass, `B` segments (sessions).

A row's path has one token at each position: the committed text up to some length, then the row's ancestors in a tree
and itself. So tree attention is causal attention over the row's own list of slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from easyspec.ops.rows import Int64Array, PassRows

IntegerT = TypeVar("IntegerT", np.int32, np.int64)
_NONE_SELECTED = np.zeros(0, dtype=np.int32)


@dataclass(slots=True)  # not frozen: one a session and step
class Segment:
    """One session's rows in a pass.

    Row i is token `token_ids[i]` at `positions[i]`; its K and V go to `slots[i]`. It sees the first
    `num_visible[i]` committed positions of `slots_by_position` (which already holds the slots of rows that
    extend the committed text, the row's own included), and then the tree slots `paths[i]`: its ancestors' and its own.
    Without a tree `paths` is empty.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    num_visible: Sequence[int]
    slots_by_position: Int64Array
    paths: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)  # not frozen: one a pass
class RowLayout:
    """The rows of all segments, one segment after the other. `segments` are what it was made of."""

    rows: PassRows
    num_rows: tuple[int, ...]
    first_rows: tuple[int, ...]
    segments: tuple[Segment, ...]

    def flat_row(self, segment: int, row: int) -> int:
        """Index of a segment's row among all rows."""
        return self.first_rows[segment] + row

    def select(self, rows: Sequence[int]) -> PassRows:
        return replace(self.rows, selected=np.asarray(rows, dtype=np.int32))


def lay_out(segments: Sequence[Segment]) -> RowLayout:
    num_rows = tuple(len(segment) for segment in segments)
    first_rows = (0, *itertools.accumulate(num_rows))[:-1]
    paths = [path for segment in segments for path in segment.paths or itertools.repeat((), len(segment))]
    rows = PassRows(
        token_ids=_joined([segment.token_ids for segment in segments], np.int32),
        positions=_joined([segment.positions for segment in segments], np.int32),
        slots=_joined([segment.slots for segment in segments], np.int64),
        segment_of_row=np.repeat(np.arange(len(segments), dtype=np.int32), num_rows),
        num_committed=_joined([segment.num_visible for segment in segments], np.int32),
        committed=[segment.slots_by_position for segment in segments],
        extra=_joined(paths, np.int64),
        first_extra=np.fromiter(itertools.accumulate(map(len, paths), initial=0), np.int32, len(paths) + 1),
        selected=_NONE_SELECTED,
    )
    return RowLayout(rows, num_rows, first_rows, tuple(segments))


def _joined(parts: Sequence[Sequence[int]], dtype: type[IntegerT]) -> npt.NDArray[IntegerT]:
    """All parts, one after the other: an array for each would take longer where they are short."""
    return np.fromiter(itertools.chain.from_iterable(parts), dtype, sum(map(len, parts)))
