"""Which rows a forward pass computes and which cached tokens each of them sees.

Dimensions: `B` segments (sessions) in the pass, `M` rows per segment after padding, `G` query heads
per KV head, `C` block size in positions, `W` columns per block, `K` blocks.

A session's cached tokens are laid out in *blocks* by absolute position: block k holds positions
kC..kC+C-1 in its first C columns; tree nodes, which share positions, stand behind them in the block of
their position, parents first. A row therefore meets the tokens it sees in the order of their positions
and in the block of their positions, whether they were committed long ago or guessed just now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from easyspec.model.kv_cache import TRASH_SLOT

BLOCK_SIZE = 128
# With at most 64 tree columns a block has at most 192, which the CPU's product kernels sum one after the other.
MAX_TREE_COLUMNS = 64
ROW_BUCKETS = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_COLUMN_MULTIPLE = 16

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TreeColumns:
    """Tree nodes a segment's rows may see: slots and positions in topological order, and who sees whom.

    `visible` is [rows of the segment, nodes].
    """

    slots: Sequence[int]
    positions: Sequence[int]
    visible: npt.NDArray[np.bool_]


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


@dataclass
class RowLayout:
    """Tensors of one pass, the same for all layers. `num_rows` per segment excludes padding.

    token_ids, positions, slots: [B * M] int64. columns: [B * K * W] int64, slots to read.
    mask: [B, K, M * G, W], 0 where a row sees a column and -inf elsewhere.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    columns: torch.Tensor
    mask: torch.Tensor
    num_rows: tuple[int, ...]
    padded_rows: int
    num_blocks: int
    _masks: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def num_segments(self) -> int:
        return len(self.num_rows)

    def flat_row(self, segment: int, row: int) -> int:
        """Index of a segment's row among all padded rows."""
        return segment * self.padded_rows + row

    def mask_for_heads(self, num_heads: int) -> torch.Tensor:
        """The mask once per KV head, [num_heads * B * K, M * G, W]; computed once per pass."""
        if num_heads not in self._masks:
            expanded = self.mask.expand(num_heads, *self.mask.shape)
            self._masks[num_heads] = expanded.reshape(-1, *self.mask.shape[2:])
        return self._masks[num_heads]


def bucket(num_rows: int, buckets: Sequence[int] = ROW_BUCKETS) -> int:
    """The smallest bucket that holds `num_rows`; beyond the last one, its next multiple."""
    for size in buckets:
        if num_rows <= size:
            return size
    return -(-num_rows // buckets[-1]) * buckets[-1]


def lay_out(segments: Sequence[Segment], num_queries_per_kv: int, device: torch.device) -> RowLayout:
    """Build the tensors of a pass over `segments`, each padded to the same number of rows."""
    padded_rows = bucket(max(len(segment) for segment in segments))
    num_blocks = max(_num_blocks(segment) for segment in segments)
    width = BLOCK_SIZE + _tree_width(segments)
    rows = np.zeros((3, len(segments), padded_rows), dtype=np.int64)
    rows[2] = TRASH_SLOT
    columns = np.full((len(segments), num_blocks, width), TRASH_SLOT, dtype=np.int64)
    visible = np.zeros((len(segments), num_blocks, padded_rows, width), dtype=np.bool_)
    for index, segment in enumerate(segments):
        count = len(segment)
        rows[0, index, :count] = segment.token_ids
        rows[1, index, :count] = segment.positions
        rows[2, index, :count] = segment.slots
        _place(segment, columns[index], visible[index])
    mask = np.where(visible, np.float32(0.0), np.float32(-np.inf))
    mask = np.repeat(mask, num_queries_per_kv, axis=2)
    token_ids, positions, slots = (torch.from_numpy(part.reshape(-1)).to(device) for part in rows)
    return RowLayout(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        columns=torch.from_numpy(columns.reshape(-1)).to(device),
        mask=torch.from_numpy(mask).to(device),
        num_rows=tuple(len(segment) for segment in segments),
        padded_rows=padded_rows,
        num_blocks=num_blocks,
    )


def _num_blocks(segment: Segment) -> int:
    last = max(*segment.num_visible, *(position + 1 for position in segment.positions))
    if segment.tree is not None and segment.tree.positions:
        last = max(last, max(segment.tree.positions) + 1)
    return -(-last // BLOCK_SIZE)


def _tree_width(segments: Sequence[Segment]) -> int:
    """Columns behind the committed ones of a block: room for the largest tree, in whole multiples."""
    largest = max((len(segment.tree.slots) if segment.tree is not None else 0) for segment in segments)
    return -(-largest // _COLUMN_MULTIPLE) * _COLUMN_MULTIPLE


def _place(segment: Segment, columns: Int64Array, visible: npt.NDArray[np.bool_]) -> None:
    """Fill one segment's columns [K, W] and visibility [K, M, W]; padding rows see the trash column."""
    num_blocks = columns.shape[0]
    committed = segment.slots_by_position[: num_blocks * BLOCK_SIZE].reshape(-1, BLOCK_SIZE)
    columns[: len(committed), :BLOCK_SIZE] = committed
    count = len(segment)
    positions = np.arange(num_blocks * BLOCK_SIZE).reshape(num_blocks, 1, BLOCK_SIZE)
    visible[:, :count, :BLOCK_SIZE] = positions < np.asarray(segment.num_visible)[None, :, None]
    visible[0, count:, 0] = True  # a row that sees nothing would be 0 / 0
    if segment.tree is None:
        return
    next_column = [BLOCK_SIZE] * num_blocks
    for node, (slot, position) in enumerate(zip(segment.tree.slots, segment.tree.positions, strict=True)):
        block = position // BLOCK_SIZE
        column = next_column[block]
        next_column[block] += 1
        columns[block, column] = slot
        visible[block, :count, column] = segment.tree.visible[:, node]
