"""Which rows a forward pass computes and which cached tokens each of them sees.

Dimensions: `T` rows of the pass, `B` segments (sessions).

A row's path has one token at each position: the committed text up to some length, then the row's ancestors in a tree
and itself. So tree attention is causal attention over the row's own list of slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from easyspec.ops.rows import Int32Array, Int64Array, PassRows

BoolArray = npt.NDArray[np.bool_]
_NO_EXTRA = np.zeros(0, dtype=np.int64)
_NONE_SELECTED = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class TreeColumns:
    """Tree nodes a segment's rows may see: slots and positions in topological order, and which node sees which.

    `visible` is [rows of the segment, nodes]; a row sees the nodes of one path, which follow the committed text.
    """

    slots: Sequence[int]
    positions: Sequence[int]
    visible: BoolArray


@dataclass(frozen=True)
class Segment:
    """One session's rows in a pass.

    Row i is token `token_ids[i]` at `positions[i]`; its K and V go to `slots[i]`. It sees the first
    `num_visible[i]` committed positions of `slots_by_position` (which already holds the slots of rows that
    extend the committed text, the row's own included), and the tree nodes that `tree` says.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    num_visible: Sequence[int]
    slots_by_position: Int64Array
    tree: TreeColumns | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
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
        """The pass with logits at some rows."""
        return replace(self.rows, selected=np.asarray(rows, dtype=np.int32))


def lay_out(segments: Sequence[Segment]) -> RowLayout:
    """The rows of a pass over `segments`."""
    num_rows = tuple(len(segment) for segment in segments)
    first_rows = (0, *itertools.accumulate(num_rows))[:-1]
    extra, first_extra = _extra_slots(segments)
    rows = PassRows(
        token_ids=_joined([segment.token_ids for segment in segments]),
        positions=_joined([segment.positions for segment in segments]),
        slots=_joined_slots(segments),
        segment_of_row=np.repeat(np.arange(len(segments), dtype=np.int32), num_rows),
        num_committed=_joined([segment.num_visible for segment in segments]),
        committed=[segment.slots_by_position for segment in segments],
        extra=extra,
        first_extra=first_extra,
        selected=_NONE_SELECTED,
    )
    return RowLayout(rows, num_rows, first_rows, tuple(segments))


def _joined_slots(segments: Sequence[Segment]) -> Int64Array:
    if len(segments) == 1:
        return np.asarray(segments[0].slots, dtype=np.int64)
    return np.concatenate([np.asarray(segment.slots, dtype=np.int64) for segment in segments])


def _joined(parts: Sequence[Sequence[int]]) -> Int32Array:
    if len(parts) == 1:
        return np.asarray(parts[0], dtype=np.int32)
    return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


def _extra_slots(segments: Sequence[Segment]) -> tuple[Int64Array, Int32Array]:
    """The tree slots that rows see, in the order of the rows, and where each row's begin: [rows + 1]."""
    slots: list[Int64Array] = [_NO_EXTRA]
    first = np.zeros(sum(map(len, segments)) + 1, dtype=np.int32)
    row = 1
    for segment in segments:
        if segment.tree is not None and len(segment.tree.slots) > 0:
            visible = segment.tree.visible
            slots.append(np.asarray(segment.tree.slots, dtype=np.int64)[np.nonzero(visible)[1]])
            first[row : row + len(segment)] = visible.sum(axis=1)
        row += len(segment)
    if len(slots) == 1:
        return _NO_EXTRA, first
    return np.concatenate(slots), np.cumsum(first, dtype=np.int32)
