from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from easyspec.model.kv_cache import TRASH_SLOT
from easyspec.model.row_layout import BLOCK_SIZE, ROW_BUCKETS, RowLayout, Segment, TreeColumns, bucket, lay_out

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("num_rows", "expected"), [(1, 4), (4, 4), (5, 8), (17, 24), (512, 512), (513, 1024), (1025, 1536)]
)
def test_buckets(num_rows: int, expected: int) -> None:
    assert bucket(num_rows) == expected
    assert bucket(bucket(num_rows)) == expected


def test_buckets_are_counts_whose_products_agree() -> None:
    """Products of 1 to 3 rows, and with threads of other odd counts, differ from larger ones in float32."""
    assert all(size % 4 == 0 for size in ROW_BUCKETS)


def chain(start: int, count: int) -> Segment:
    """Rows start..start+count-1; the token of position p lives in slot 1000 + p."""
    num_blocks = -(-(start + count) // BLOCK_SIZE)
    by_position = np.full(num_blocks * BLOCK_SIZE, TRASH_SLOT, dtype=np.int64)
    by_position[: start + count] = np.arange(1000, 1000 + start + count)
    positions = range(start, start + count)
    slots = [1000 + position for position in positions]
    return Segment(range(count), positions, slots, [position + 1 for position in positions], by_position)


def seen_slots(layout: RowLayout, segment: int, row: int) -> list[int]:
    """Slots that a row reads, in the order of blocks and columns."""
    columns = layout.columns.view(layout.num_segments, -1)[segment]
    num_queries = layout.mask.shape[2] // layout.padded_rows
    rows = layout.mask[segment, :, row * num_queries : (row + 1) * num_queries]  # [K, G, W]
    assert set(rows.unique().tolist()) <= {0.0, float("-inf")}
    assert all(torch.equal(rows[:, 0], rows[:, query]) for query in range(num_queries))
    seen: list[int] = columns[(rows[:, 0] == 0.0).reshape(-1)].tolist()
    return seen


def test_a_row_sees_its_past_and_itself() -> None:
    layout = lay_out([chain(125, 6), chain(0, 3)], 2, CPU)
    assert (layout.num_segments, layout.padded_rows, layout.num_blocks) == (2, 8, 2)
    assert layout.num_rows == (6, 3)
    for row in range(6):
        assert seen_slots(layout, 0, row) == [1000 + position for position in range(126 + row)]
    for row in range(3):
        assert seen_slots(layout, 1, row) == [1000 + position for position in range(row + 1)]


def test_padding_rows_write_to_the_trash_slot_and_read_something_finite() -> None:
    layout = lay_out([chain(125, 6), chain(0, 3)], 2, CPU)
    for segment, count in enumerate(layout.num_rows):
        for row in range(layout.padded_rows):
            flat = layout.flat_row(segment, row)
            assert (layout.slots[flat] == TRASH_SLOT) == (row >= count)
            assert len(seen_slots(layout, segment, row)) > 0
    assert layout.positions[layout.flat_row(0, 2)] == 127
    assert layout.token_ids[layout.flat_row(1, 2)] == 2


def test_tree_nodes_stand_in_the_block_of_their_position() -> None:
    """Root at 126, its two children at 127, grandchild and great-grandchild in the next block."""
    root = chain(126, 1)
    visible = np.array(
        [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]],
        dtype=np.bool_,
    )
    positions = [127, 127, 128, 129]
    segment = replace(
        root,
        token_ids=range(5),
        positions=[126, *positions],
        slots=[1126, 1, 2, 3, 4],
        num_visible=[127] * 5,
        tree=TreeColumns([1, 2, 3, 4], positions, visible),
    )
    layout = lay_out([segment], 3, CPU)
    committed = list(range(1000, 1127))
    assert layout.num_blocks == 2
    assert layout.mask.shape == (1, 2, 8 * 3, BLOCK_SIZE + 16)
    assert seen_slots(layout, 0, 0) == committed
    assert seen_slots(layout, 0, 1) == [*committed, 1]
    assert seen_slots(layout, 0, 2) == [*committed, 2]
    assert seen_slots(layout, 0, 4) == [*committed, 2, 3, 4]
    columns = layout.columns.view(2, -1)
    assert columns[0, BLOCK_SIZE : BLOCK_SIZE + 3].tolist() == [1, 2, TRASH_SLOT]
    assert columns[1, BLOCK_SIZE : BLOCK_SIZE + 3].tolist() == [3, 4, TRASH_SLOT]


def test_the_mask_for_heads_repeats_the_mask() -> None:
    layout = lay_out([chain(0, 3), chain(5, 2)], 2, CPU)
    mask = layout.mask_for_heads(3)
    assert mask.shape == (3 * 2 * 1, 4 * 2, BLOCK_SIZE)
    for head in range(3):
        assert torch.equal(mask[head * 2 : head * 2 + 2], layout.mask[:, 0])
    assert layout.mask_for_heads(3) is mask
