"""A session's rows in a pass: committed tokens, and nodes of a tree behind them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from easyspec.model.kv_cache import SessionSlots
from easyspec.model.row_layout import Segment


def committed_segment(token_ids: Sequence[int], slots: SessionSlots, positions: range) -> Segment:
    """Rows for the cached tokens at `positions`, whose ids are `token_ids`: each sees what comes before, and itself."""
    own = slots.by_position[positions.start : positions.stop].tolist()
    visible = [position + 1 for position in positions]
    return Segment(token_ids, positions, own, visible, slots.by_position)


def with_nodes(
    chain: Segment,
    token_ids: Sequence[int],
    positions: Sequence[int],
    slots: Sequence[int],
    parents: Sequence[int | None],
) -> Segment:
    """Rows of `chain`, and of nodes behind its last token, which see what that sees, their ancestors and themselves.

    `parents`: of each node, None for the last token of the chain; parents come first.
    """
    paths: list[Sequence[int]] = []
    for slot, parent in zip(slots, parents, strict=True):
        paths.append([slot] if parent is None else [*paths[parent], slot])
    return Segment(
        token_ids=[*chain.token_ids, *token_ids],
        positions=[*chain.positions, *positions],
        slots=[*chain.slots, *slots],
        num_visible=[*chain.num_visible, *([chain.num_visible[-1]] * len(slots))],
        slots_by_position=chain.slots_by_position,
        paths=[*itertools.repeat((), len(chain)), *paths],
    )
