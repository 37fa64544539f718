from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from easyspec.model.kv_cache import TRASH_SLOT
from easyspec.model.row_layout import (
    BLOCK_SIZE,
    ROW_BUCKETS,
    AttentionGroup,
    RowLayout,
    Segment,
    TreeColumns,
    bucket,
    lay_out,
)

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


def place(layout: RowLayout, segment: int) -> tuple[AttentionGroup, int]:
    """A segment's group and its index there."""
    return next((group, group.segments.index(segment)) for group in layout.groups if segment in group.segments)


def seen_slots(layout: RowLayout, segment: int, row: int) -> list[int]:
    """Slots that a row of a blockwise layout reads, in the order of blocks and columns."""
    group, index = place(layout, segment)
    blocks = (group.blocks.segment_of == index).nonzero()[:, 0]
    columns = group.columns.view(len(group.blocks), -1)[blocks]
    num_queries = group.mask.shape[1] // group.padded_rows
    rows = group.mask[blocks, row * num_queries : (row + 1) * num_queries]  # [K, G, W]
    assert set(rows.unique().tolist()) <= {0.0, float("-inf")}
    assert all(torch.equal(rows[:, 0], rows[:, query]) for query in range(num_queries))
    seen: list[int] = columns[rows[:, 0] == 0.0].tolist()
    return seen


def test_a_row_sees_its_past_and_itself() -> None:
    layout = lay_out([chain(125, 6), chain(0, 3)], 2, CPU)
    assert (layout.num_segments, layout.num_rows, layout.first_rows) == (2, (6, 3), (0, 6))
    for row in range(6):
        assert seen_slots(layout, 0, row) == [1000 + position for position in range(126 + row)]
    for row in range(3):
        assert seen_slots(layout, 1, row) == [1000 + position for position in range(row + 1)]


def test_rows_of_all_segments_are_padded_once() -> None:
    layout = lay_out([chain(125, 6), chain(0, 3), chain(40, 1)], 2, CPU)
    assert layout.token_ids.shape == layout.positions.shape == layout.slots.shape == (16,)
    assert (layout.slots[10:] == TRASH_SLOT).all()
    assert (layout.slots[:10] != TRASH_SLOT).all()
    assert layout.positions[layout.flat_row(0, 2)] == 127
    assert layout.token_ids[layout.flat_row(1, 2)] == 2
    assert layout.positions[layout.flat_row(2, 0)] == 40


SHAPES = [[(125, 6), (0, 3)], [(0, 1)] * 5, [(300, 1), (0, 200), (10, 17), (400, 1), (5, 1), (129, 40)], [(700, 3)]]


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("num_queries", [1, 2, 3, 8])
def test_groups_hold_every_row_once_and_put_it_back(
    shapes: list[tuple[int, int]], num_queries: int, is_flat: bool
) -> None:
    layout = lay_out([chain(*shape) for shape in shapes], num_queries, CPU, is_flat=is_flat)
    assert sorted(segment for group in layout.groups for segment in group.segments) == list(range(len(shapes)))
    padded = []
    for group in layout.groups:
        assert group.padded_rows * num_queries % 4 == 0
        rows = torch.arange(len(layout.token_ids)) if group.rows is None else group.rows
        assert len(rows) == group.num_segments * group.padded_rows
        padded.append(rows)
    taken = torch.cat(padded)
    if layout.place_of_row is not None:
        taken = taken[layout.place_of_row]
    num_rows = sum(layout.num_rows)
    assert taken[:num_rows].tolist() == list(range(num_rows))
    for segment, (start, count) in enumerate(shapes):
        if not is_flat:
            assert seen_slots(layout, segment, count - 1) == [1000 + position for position in range(start + count)]


def test_a_session_that_decodes_pays_for_its_own_rows_and_context_only() -> None:
    layout = lay_out([chain(900, 1), *[chain(20, 1)] * 4, chain(0, 256)], 2, CPU)
    assert [(group.num_segments, group.padded_rows, len(group.blocks)) for group in layout.groups] == [
        (5, 2, 8 + 4),
        (1, 256, 2),
    ]
    assert layout.groups[0].segments[0] == 0  # longest first
    assert layout.groups[0].blocks.counts == (5, 1, 1, 1, 1, 1, 1, 1)


def test_a_group_that_would_save_little_is_not_made() -> None:
    assert len(lay_out([chain(20, 1), chain(20, 4), chain(20, 5)], 2, CPU).groups) == 1


def test_short_contexts_read_no_whole_block() -> None:
    assert lay_out([chain(60, 1), chain(70, 1)], 2, CPU).groups[0].mask.shape == (2, 2 * 2, 80)
    assert lay_out([chain(2, 1)], 2, CPU).groups[0].mask.shape == (1, 4 * 2, 64)


def test_padding_rows_read_something_finite() -> None:
    layout = lay_out([chain(125, 6), chain(0, 3)], 2, CPU)
    for segment in range(2):
        for row in range(place(layout, segment)[0].padded_rows):
            assert len(seen_slots(layout, segment, row)) > 0


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
    (group,) = layout.groups
    assert group.mask.shape == (2, 8 * 3, BLOCK_SIZE + 16)
    assert seen_slots(layout, 0, 0) == committed
    assert seen_slots(layout, 0, 1) == [*committed, 1]
    assert seen_slots(layout, 0, 2) == [*committed, 2]
    assert seen_slots(layout, 0, 4) == [*committed, 2, 3, 4]
    columns = group.columns.view(2, -1)
    assert columns[0, BLOCK_SIZE : BLOCK_SIZE + 3].tolist() == [1, 2, TRASH_SLOT]
    assert columns[1, BLOCK_SIZE : BLOCK_SIZE + 3].tolist() == [3, 4, TRASH_SLOT]


def test_the_mask_for_heads_repeats_the_mask() -> None:
    (group,) = lay_out([chain(0, 3), chain(5, 2)], 2, CPU).groups
    mask = group.mask_for_heads(3)
    assert mask.shape == (3 * 2, 4 * 2, 64)
    for head in range(3):
        assert torch.equal(mask[head * 2 : head * 2 + 2], group.mask)
    assert group.mask_for_heads(3) is mask
