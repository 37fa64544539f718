"""Which rows a forward pass computes and which cached tokens each of them sees.

Dimensions: `T` rows of the pass after padding, `B` segments (sessions) of an attention group, `M` rows per segment
of the group, `G` query heads per KV head, `C` block size in positions, `W` columns per block, `X` blocks of the group.

Products with weights run over the rows of all segments one after the other, padded once. Attention runs over groups
of segments with about as many rows: a session that decodes one token pays neither for a neighbour's tree nor for
its context.

A session's cached tokens are laid out in *blocks* by absolute position: block k holds positions
kC..kC+C-1 in its first C columns; tree nodes, which share positions, stand behind them in the block of
their position, parents first. A row therefore meets the tokens it sees in the order of their positions
and in the block of their positions, whether they were committed long ago or guessed just now.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from easyspec.model.kv_cache import TRASH_SLOT
from easyspec.speculation.transfer import moved

BLOCK_SIZE = 128
# With at most 64 tree columns a block has at most 192, which the CPU's product kernels sum one after the other.
MAX_TREE_COLUMNS = 64
ROW_BUCKETS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Products of 1 to 3 rows take another kernel and have other bits (docs/decisions/0003).
_ROW_MULTIPLE = 4
_COLUMN_MULTIPLE = 16
_MIN_COLUMNS = 64
# Scores (rows x columns, times query heads) that a further attention group must save to be worth its own calls.
_MIN_SAVED_SCORES = 8192

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class TreeColumns:
    """Tree nodes a segment's rows may see: slots and positions in topological order, and who sees whom.

    `visible` is [rows of the segment, nodes].
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
class Blocks:
    """The blocks of a group's segments.

    `counts[k]` segments have a k-th block: the first ones, as segments stand in order of falling length. In the order
    of the columns come all first blocks, then all second ones, and so on (`segment_of` [X]); or, laid out flat, a
    segment's blocks one after the other, every segment having as many as the longest.
    """

    counts: tuple[int, ...]
    segment_of: torch.Tensor

    @property
    def are_even(self) -> bool:
        """Whether all segments have the same number of blocks."""
        return self.counts[0] == self.counts[-1]

    def __len__(self) -> int:
        return int(self.segment_of.shape[0])


@dataclass
class AttentionGroup:
    """Segments whose attention is one call.

    rows: [B * M] int64, row of the pass that each query row is (padding repeats one), or None where they are the rows
    of the pass as they stand. columns: [X * W] int64, slots to read. mask: [X, M * G, W], or [B, M * G, X / B * W]
    laid out flat; 0 where a row sees a column and -inf elsewhere.
    """

    segments: tuple[int, ...]
    padded_rows: int
    rows: torch.Tensor | None
    columns: torch.Tensor
    blocks: Blocks
    mask: torch.Tensor
    _masks: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def num_segments(self) -> int:
        return len(self.segments)

    def mask_for_heads(self, num_heads: int) -> torch.Tensor:
        """The mask once per KV head, heads first; computed once per pass."""
        if num_heads not in self._masks:
            expanded = self.mask.expand(num_heads, *self.mask.shape)
            self._masks[num_heads] = expanded.reshape(-1, *self.mask.shape[1:])
        return self._masks[num_heads]


@dataclass(frozen=True)
class RowLayout:
    """Tensors of one pass, the same for all layers.

    token_ids, positions, slots: [T] int64. place_of_row: [T], where a row stands among the query rows of all groups,
    or None where that is its own number. `num_rows` per segment excludes padding. `segments` are what it was made of.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    groups: tuple[AttentionGroup, ...]
    place_of_row: torch.Tensor | None
    num_rows: tuple[int, ...]
    first_rows: tuple[int, ...]
    segments: tuple[Segment, ...]

    @property
    def num_segments(self) -> int:
        return len(self.num_rows)

    def flat_row(self, segment: int, row: int) -> int:
        """Index of a segment's row among all rows."""
        return self.first_rows[segment] + row


def bucket(num_rows: int, buckets: Sequence[int] = ROW_BUCKETS) -> int:
    """The smallest bucket that holds `num_rows`; beyond the last one, its next multiple."""
    for size in buckets:
        if num_rows <= size:
            return size
    return -(-num_rows // buckets[-1]) * buckets[-1]


def lay_out(
    segments: Sequence[Segment], num_queries_per_kv: int, device: torch.device, *, is_flat: bool = False
) -> RowLayout:
    """Build the tensors of a pass over `segments`, for blockwise attention or for flat attention."""
    num_rows = tuple(len(segment) for segment in segments)
    first_rows = (0, *itertools.accumulate(num_rows))[:-1]
    total = bucket(sum(num_rows))
    rows = np.zeros((3, total), dtype=np.int64)
    rows[2] = TRASH_SLOT
    for segment, first in zip(segments, first_rows, strict=True):
        last = first + len(segment)
        rows[0, first:last] = segment.token_ids
        rows[1, first:last] = segment.positions
        rows[2, first:last] = segment.slots
    builder = _GroupBuilder(segments, num_queries_per_kv, device, is_flat)
    groups: tuple[AttentionGroup, ...]
    place_of_row: torch.Tensor | None = None
    if len(segments) == 1:
        groups = (builder.build((0,), total, None),)
    else:
        groups, places = builder.build_all(first_rows, total)
        place_of_row = moved(torch.from_numpy(places), device)
    token_ids, positions, slots = moved(torch.from_numpy(rows), device)
    return RowLayout(token_ids, positions, slots, groups, place_of_row, num_rows, first_rows, tuple(segments))


class _GroupBuilder:
    """Sorts segments into attention groups and builds their tensors."""

    def __init__(
        self, segments: Sequence[Segment], num_queries_per_kv: int, device: torch.device, is_flat: bool
    ) -> None:
        self._segments = segments
        self._num_queries_per_kv = num_queries_per_kv
        self._device = device
        self._is_flat = is_flat
        self._num_blocks = [count_blocks(segment) for segment in segments]
        # The fewest rows of one segment whose query rows are a multiple of four.
        self._least_rows = _ROW_MULTIPLE // int(np.gcd(_ROW_MULTIPLE, num_queries_per_kv))

    def build_all(self, first_rows: Sequence[int], total: int) -> tuple[tuple[AttentionGroup, ...], Int64Array]:
        """All groups, and where each row of the pass stands among their query rows."""
        groups: list[AttentionGroup] = []
        places = np.zeros(total, dtype=np.int64)
        start = 0
        for padded_rows, members in self._sort():
            rows = np.zeros((len(members), padded_rows), dtype=np.int64)
            for index, member in enumerate(members):
                first, count = first_rows[member], len(self._segments[member])
                rows[index] = first
                rows[index, :count] = np.arange(first, first + count)
                places[first : first + count] = start + index * padded_rows + np.arange(count)
            start += rows.size
            groups.append(
                self.build(tuple(members), padded_rows, moved(torch.from_numpy(rows.reshape(-1)), self._device))
            )
        return tuple(groups), places

    def _sort(self) -> list[tuple[int, list[int]]]:
        """Rows per segment and segments of each group, longest segment first."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for index, segment in enumerate(self._segments):
            padded_rows = self._least_rows if len(segment) <= self._least_rows else bucket(len(segment))
            # Flat groups pad every context to the longest: keep those of very different lengths apart.
            length = self._num_blocks[index].bit_length() if self._is_flat else 0
            by_shape.setdefault((length, padded_rows), []).append(index)
        groups = [(padded_rows, members) for (_, padded_rows), members in sorted(by_shape.items())]
        kept: list[tuple[int, list[int]]] = []
        for group in groups:
            if kept and self._saved_scores(kept[-1], group) < _MIN_SAVED_SCORES:
                group = (max(kept[-1][0], group[0]), kept.pop()[1] + group[1])
            kept.append(group)
        for _, members in kept:
            members.sort(key=lambda index: -self._num_blocks[index])
        return kept

    def _saved_scores(self, one: tuple[int, list[int]], other: tuple[int, list[int]]) -> int:
        """Scores that two groups compute fewer than one group of both."""
        apart = self._num_scores(*one) + self._num_scores(*other)
        return self._num_scores(max(one[0], other[0]), one[1] + other[1]) - apart

    def _num_scores(self, padded_rows: int, members: Sequence[int]) -> int:
        lengths = [self._num_blocks[member] for member in members]
        num_blocks = len(lengths) * max(lengths) if self._is_flat else sum(lengths)
        return num_blocks * padded_rows * BLOCK_SIZE * self._num_queries_per_kv

    def build(self, members: tuple[int, ...], padded_rows: int, rows: torch.Tensor | None) -> AttentionGroup:
        """The group of `members`, which are sorted by falling number of blocks."""
        lengths = [self._num_blocks[member] for member in members]
        if self._is_flat:
            lengths = [lengths[0]] * len(lengths)
        counts = tuple(sum(length > block for length in lengths) for block in range(lengths[0]))
        firsts = (0, *itertools.accumulate(counts))
        segments = [self._segments[member] for member in members]
        num_committed = _committed_width(segments) if lengths[0] == 1 else BLOCK_SIZE
        width = num_committed + _tree_width(segments)
        columns = np.full((firsts[-1], width), TRASH_SLOT, dtype=np.int64)
        visible = np.zeros((firsts[-1], padded_rows, width), dtype=np.bool_)
        for index, segment in enumerate(segments):
            if self._is_flat:
                places = np.arange(index * lengths[0], (index + 1) * lengths[0])
            else:
                places = np.asarray(firsts[: lengths[index]]) + index
            place_columns(segment, places, num_committed, columns, visible)
        mask = np.where(visible, np.float32(0.0), np.float32(-np.inf))
        mask = np.repeat(mask, self._num_queries_per_kv, axis=1)
        if self._is_flat:
            mask = mask.reshape(len(members), lengths[0], -1, width).swapaxes(1, 2)
            mask = np.ascontiguousarray(mask).reshape(len(members), -1, lengths[0] * width)
        segment_of = np.concatenate([np.arange(count) for count in counts])
        return AttentionGroup(
            segments=members,
            padded_rows=padded_rows,
            rows=rows,
            columns=moved(torch.from_numpy(columns.reshape(-1)), self._device),
            blocks=Blocks(counts, moved(torch.from_numpy(segment_of), self._device)),
            mask=moved(torch.from_numpy(mask), self._device),
        )


def count_blocks(segment: Segment) -> int:
    """Blocks up to the last position that a row of the segment stands at or sees."""
    last = max(*segment.num_visible, *(position + 1 for position in segment.positions))
    if segment.tree is not None and segment.tree.positions:
        last = max(last, max(segment.tree.positions) + 1)
    return -(-last // BLOCK_SIZE)


def _tree_width(segments: Sequence[Segment]) -> int:
    """Columns behind the committed ones of a block: room for the largest tree, in whole multiples."""
    largest = max((len(segment.tree.slots) if segment.tree is not None else 0) for segment in segments)
    return -(-largest // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE


def _committed_width(segments: Sequence[Segment]) -> int:
    """Columns of committed tokens in groups of a single block: no more than are seen, in whole multiples."""
    most = max(max(segment.num_visible) for segment in segments)
    return min(BLOCK_SIZE, max(_MIN_COLUMNS, -(-most // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE))


def place_columns(segment: Segment, places: Int64Array, width: int, columns: Int64Array, visible: BoolArray) -> None:
    """Fill a segment's blocks, which stand at `places` of columns [X, W] and visible [X, M, W].

    `width` columns are for committed tokens. Padding rows see the trash column.
    """
    num_blocks, count = len(places), len(segment)
    committed = segment.slots_by_position[: num_blocks * BLOCK_SIZE].reshape(-1, BLOCK_SIZE)
    columns[places[: len(committed)], :width] = committed[:, :width]
    positions = np.arange(num_blocks * BLOCK_SIZE).reshape(num_blocks, 1, BLOCK_SIZE)[..., :width]
    visible[places, :count, :width] = positions < np.asarray(segment.num_visible)[None, :, None]
    visible[places[0], count:, 0] = True  # a row that sees nothing would be 0 / 0
    if segment.tree is None:
        return
    next_column = [width] * num_blocks
    for node, (slot, position) in enumerate(zip(segment.tree.slots, segment.tree.positions, strict=True)):
        block = position // BLOCK_SIZE
        column = next_column[block]
        next_column[block] += 1
        columns[places[block], column] = slot
        visible[places[block], :count, column] = segment.tree.visible[:, node]
