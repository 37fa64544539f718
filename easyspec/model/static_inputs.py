"""Input buffers of captured passes, which keep their addresses while what they hold changes.

Dimensions: `B` segments, `M` rows per segment, `T` = B * M rows, `K` blocks per segment, `X` = B * K blocks, `W`
columns per block, `G` query heads per KV head.

All inputs of a pass lie in one piece of memory, written on the host and copied to the device in one go. Shapes share
it: only one pass is prepared at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from easyspec.model.kv_cache import TRASH_SLOT
from easyspec.model.pass_shapes import NUM_COLUMNS, PassShape
from easyspec.model.row_layout import (
    BLOCK_SIZE,
    AttentionGroup,
    Blocks,
    BoolArray,
    Int64Array,
    RowLayout,
    Segment,
    count_blocks,
    place_columns,
)

_INT64_BYTES = 8


@dataclass(frozen=True)
class PassBuffers:
    """A shape's part of the device's buffer.

    token_ids, positions, slots: [T] int64; columns: [X * W] int64, slots to read; visible: [X, M, W] bool. A segment's
    blocks stand together if `is_flat`; otherwise all first blocks, then all second ones, and so on.
    """

    shape: PassShape
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    columns: torch.Tensor
    visible: torch.Tensor
    segment_of: torch.Tensor
    num_queries_per_kv: int
    is_flat: bool

    def layout(self) -> RowLayout:
        """The layout of whatever the buffers hold; its mask is computed on the device, from `visible` as it then is."""
        shape = self.shape
        group = AttentionGroup(
            segments=tuple(range(shape.num_segments)),
            padded_rows=shape.rows_per_segment,
            rows=None,
            columns=self.columns,
            blocks=Blocks((shape.num_segments,) * shape.num_blocks, self.segment_of),
            mask=self._mask(),
        )
        first_rows = tuple(range(0, shape.num_rows, shape.rows_per_segment))
        num_rows = (shape.rows_per_segment,) * shape.num_segments
        return RowLayout(self.token_ids, self.positions, self.slots, (group,), None, num_rows, first_rows, ())

    def _mask(self) -> torch.Tensor:
        shape, visible = self.shape, self.visible
        if self.is_flat:
            visible = visible.view(shape.num_segments, shape.num_blocks, shape.rows_per_segment, NUM_COLUMNS)
            visible = visible.transpose(1, 2).reshape(shape.num_segments, shape.rows_per_segment, -1)  # [B, M, K * W]
        mask = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, -torch.inf)
        mask = mask.unsqueeze(2).expand(-1, -1, self.num_queries_per_kv, -1)
        return mask.reshape(mask.shape[0], -1, mask.shape[3])  # [X, M * G, W] or [B, M * G, K * W]


class StaticInputs:
    """The buffers, large enough for each of `shapes`. Not thread-safe: the device thread owns them."""

    def __init__(
        self, shapes: Iterable[PassShape], num_queries_per_kv: int, device: torch.device, *, is_flat: bool
    ) -> None:
        self._num_queries_per_kv = num_queries_per_kv
        self._is_flat = is_flat
        is_cuda = device.type == "cuda"
        num_bytes = max(_num_bytes(shape) for shape in shapes)
        # Pinned, so that the host need not wait for the copy.
        self._on_host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
        self._on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if is_cuda else None

    @property
    def num_bytes(self) -> int:
        """Memory on the device."""
        return self._on_device.numel()

    def buffers(self, shape: PassShape) -> PassBuffers:
        """The device's side for passes of `shape`."""
        token_ids, positions, slots, columns, visible = _views(self._on_device, shape)
        blocks = torch.arange(shape.num_segments, device=self._on_device.device)
        return PassBuffers(
            shape=shape,
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            columns=columns,
            visible=visible,
            segment_of=blocks.repeat(shape.num_blocks),
            num_queries_per_kv=self._num_queries_per_kv,
            is_flat=self._is_flat,
        )

    def fill(self, segments: Sequence[Segment], shape: PassShape) -> None:
        """Write a pass, which `shape` holds, and send it to the device. No segments make a pass of padding alone.

        Everything is written anew, padding too: rows that nobody asked for write to the trash slot and see a single
        column, and blocks that nobody has read that slot unseen.
        """
        if self._copied is not None:
            self._copied.synchronize()  # the last pass's copy has left the host's buffer; it began long ago
        token_ids, positions, slots, columns, visible = (view.numpy() for view in _views(self._on_host, shape))
        token_ids[:], positions[:], slots[:], columns[:], visible[:] = 0, 0, TRASH_SLOT, TRASH_SLOT, False
        for index, segment in enumerate(segments):
            first = index * shape.rows_per_segment
            last = first + len(segment)
            token_ids[first:last], positions[first:last] = segment.token_ids, segment.positions
            slots[first:last] = segment.slots
        self._place(segments, shape, columns.reshape(-1, NUM_COLUMNS), visible)
        self._send(_num_bytes(shape))

    def _place(self, segments: Sequence[Segment], shape: PassShape, columns: Int64Array, visible: BoolArray) -> None:
        for index in range(shape.num_segments):
            if self._is_flat:
                places = index * shape.num_blocks + np.arange(shape.num_blocks)
            else:
                places = index + np.arange(shape.num_blocks) * shape.num_segments
            if index < len(segments):
                own = places[: count_blocks(segments[index])]
                place_columns(segments[index], own, BLOCK_SIZE, columns, visible)
            else:
                visible[places[0], :, 0] = True  # a row that sees nothing would be 0 / 0

    def _send(self, num_bytes: int) -> None:
        self._on_device[:num_bytes].copy_(self._on_host[:num_bytes], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


def _sizes(shape: PassShape) -> tuple[int, int, int, int]:
    return shape.num_rows, shape.num_rows, shape.num_rows, shape.total_blocks * NUM_COLUMNS


def _num_bytes(shape: PassShape) -> int:
    num_visible = shape.total_blocks * shape.rows_per_segment * NUM_COLUMNS
    return _INT64_BYTES * sum(_sizes(shape)) + num_visible


def _views(memory: torch.Tensor, shape: PassShape) -> tuple[torch.Tensor, ...]:
    """Token ids, positions, slots and columns, then what is visible, as parts of `memory` (bytes)."""
    num_int_bytes = _INT64_BYTES * sum(_sizes(shape))
    integers = memory[:num_int_bytes].view(torch.int64).split(_sizes(shape))
    visible = memory[num_int_bytes : _num_bytes(shape)].view(torch.bool)
    return (*integers, visible.view(shape.total_blocks, shape.rows_per_segment, NUM_COLUMNS))
