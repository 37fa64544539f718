"""Drafting all levels in one pass (PARD, arXiv 2504.18583), by a draft model that was trained to fill in mask tokens.

Behind the new tokens of a calibration stand mask tokens, each at the position of a further level. Each row says what
may follow without knowing what stands at the levels between, so that candidates of a level are the same whatever
their parent. K and V of the mask rows are dropped with the pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drafter_service.model.ranking import rank_level
from drafter_service.model.state import ModelState
from easyspec.engine.segments import with_nodes
from easyspec.model.row_layout import Segment
from easyspec.speculation.ranking import TokenRanker


def with_masks(state: ModelState, chain: Segment, mask_token_id: int, slots: Sequence[int]) -> Segment:
    """The rows of a calibration, and of mask tokens in `slots` behind the committed ones.

    A mask token sees the committed text, the ones before it, and itself. Its slot is the tree's until `add_levels`.
    """
    num_masks, base_length = len(slots), len(state.token_ids)
    state.tree_slots = {-1 - index: slot for index, slot in enumerate(slots)}
    before = [index - 1 if index else None for index in range(num_masks)]
    return with_nodes(chain, [mask_token_id] * num_masks, range(base_length, base_length + num_masks), slots, before)


def add_levels(ranker: TokenRanker, state: ModelState, draft_logits: torch.Tensor, mask_token_id: int) -> None:
    """Drop the mask tokens, and grow the tree by a level for every row of `draft_logits` [levels, V]; one host sync a
    level."""
    state.drop_tree()
    draft_logits = draft_logits.index_fill(1, torch.tensor([mask_token_id], device=draft_logits.device), float("-inf"))
    for row in draft_logits:
        if not state.growing.frontier:
            return
        level = row[None].expand(len(state.growing.frontier), -1).contiguous()
        (candidates,) = rank_level(ranker, [state], level)
        state.growing.add_level(candidates)
