from __future__ import annotations

import numpy as np

from easyspec.model.row_layout import Segment, lay_out
from easyspec.ops.kv_pool import TRASH_SLOT


def chain(start: int, count: int, first_slot: int = 1000) -> Segment:
    """Rows start..start+count-1; the token of position p lives in slot first_slot + p. Unused slots follow."""
    by_position = np.full(start + count + 7, TRASH_SLOT, dtype=np.int64)
    by_position[: start + count] = np.arange(first_slot, first_slot + start + count)
    positions = range(start, start + count)
    slots = [first_slot + position for position in positions]
    return Segment(range(count), positions, slots, [position + 1 for position in positions], by_position)


def test_a_row_sees_its_past_and_itself() -> None:
    layout = lay_out([chain(125, 6), chain(0, 3, first_slot=5)])
    assert (layout.num_rows, layout.first_rows) == ((6, 3), (0, 6))
    for row in range(6):
        assert layout.rows.seen_slots(row).tolist() == [1000 + position for position in range(126 + row)]
    for row in range(3):
        assert layout.rows.seen_slots(6 + row).tolist() == [5 + position for position in range(row + 1)]


def test_rows_of_all_segments_stand_one_after_the_other() -> None:
    layout = lay_out([chain(125, 6), chain(0, 3), chain(40, 1)])
    rows = layout.rows
    assert len(rows) == 10
    assert rows.segment_of_row.tolist() == [0] * 6 + [1] * 3 + [2]
    assert rows.positions[layout.flat_row(0, 2)] == 127
    assert rows.token_ids[layout.flat_row(1, 2)] == 2
    assert rows.slots[layout.flat_row(2, 0)] == 1040
    for array in (rows.token_ids, rows.positions, rows.segment_of_row, rows.num_committed, rows.first_extra):
        assert array.dtype == np.int32
    assert rows.slots.dtype == rows.extra.dtype == np.int64


def test_selected_rows_are_any_and_in_any_order() -> None:
    layout = lay_out([chain(0, 4)])
    assert layout.rows.selected.tolist() == []
    assert layout.select([3, 0, 3]).selected.tolist() == [3, 0, 3]
    assert layout.select([3]).slots is layout.rows.slots


def test_tree_nodes_follow_the_text_that_they_hang_from() -> None:
    """A root and two branches, beside a session without a tree and one whose tree is empty."""
    root = chain(126, 1)
    with_tree = Segment(
        token_ids=range(5),
        positions=[126, 127, 127, 128, 129],
        slots=[1126, 9, 2, 7, 4],
        num_visible=[127] * 5,
        slots_by_position=root.slots_by_position,
        paths=[[], [9], [2], [2, 7], [2, 7, 4]],
    )
    rootless = Segment([1], [3], [1003], [4], chain(3, 1).slots_by_position, [[]])
    layout = lay_out([chain(2, 2), with_tree, rootless])
    committed = list(range(1000, 1127))
    assert layout.rows.first_extra.tolist() == [0, 0, 0, 0, 1, 2, 4, 7, 7]
    assert layout.rows.seen_slots(layout.flat_row(0, 1)).tolist() == [1000, 1001, 1002, 1003]
    assert layout.rows.seen_slots(layout.flat_row(1, 0)).tolist() == committed
    assert layout.rows.seen_slots(layout.flat_row(1, 1)).tolist() == [*committed, 9]
    assert layout.rows.seen_slots(layout.flat_row(1, 2)).tolist() == [*committed, 2]
    assert layout.rows.seen_slots(layout.flat_row(1, 4)).tolist() == [*committed, 2, 7, 4]
    assert layout.rows.seen_slots(layout.flat_row(2, 0)).tolist() == [1000, 1001, 1002, 1003]
