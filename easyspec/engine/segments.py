"""A session's rows in a pass: committed tokens, and nodes of a tree behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from easyspec.model.kv_cache import SessionSlots
from easyspec.model.row_layout import BoolArray, Segment, TreeColumns


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
    num_chain, num_nodes = len(chain), len(token_ids)
    visible = np.zeros((num_chain + num_nodes, num_nodes), dtype=np.bool_)
    visible[num_chain:] = visible_nodes(parents)
    return Segment(
        token_ids=[*chain.token_ids, *token_ids],
        positions=[*chain.positions, *positions],
        slots=[*chain.slots, *slots],
        num_visible=[*chain.num_visible, *([chain.num_visible[-1]] * num_nodes)],
        slots_by_position=chain.slots_by_position,
        tree=TreeColumns(slots, positions, visible),
    )


def visible_nodes(parents: Sequence[int | None]) -> BoolArray:
    """The nodes that each node sees, [nodes, nodes]: ancestors and itself. `parents`: of each node, parents first."""
    visible = np.zeros((len(parents), len(parents)), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent is not None:
            visible[node] = visible[parent]
        visible[node, node] = True
    return visible
