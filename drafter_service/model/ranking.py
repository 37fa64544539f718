"""Candidates for the next level of several trees at once, under each request's noise and grammar.

Dimensions: `R` frontier rows of all trees, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from drafter_service.grammar_preference import NOTHING_ALLOWED
from drafter_service.model.growth import Candidates
from drafter_service.model.state import ModelState
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.ranking import TokenRanker
from easyspec.speculation.token_mask import mask_forbidden_

# Children looked at per row: the chance that the base model picks a later one is small. The same number for every
# session, so that a node's value does not depend on the budgets of others in the batch.
_NUM_CANDIDATES = 8
# Scores of forbidden tokens are below, those of others far above.
_FORBIDDEN_SCORE = -1e29


def rank_level(ranker: TokenRanker, states: Sequence[ModelState], draft_logits: torch.Tensor) -> list[list[Candidates]]:
    """Per tree the candidates of every frontier row, whose logits stand in that order in `draft_logits` [R, V]."""
    positions: list[int] = []
    samplings: list[SamplingParameters] = []
    masks: list[NDArray[np.uint8] | None] = []
    for state in states:
        tree, request = state.growing, state.request
        positions += [len(state.token_ids) + tree.level] * len(tree.frontier)
        samplings += [request.sampling] * len(tree.frontier)
        if request.preference is None:
            masks += [None] * len(tree.frontier)
        else:
            paths = [tree.path_token_ids(row) for row in tree.frontier]
            masks += request.preference.allowed_after(state.token_ids, paths)
    if states and (bridge := states[0].bridge) is not None:
        draft_logits = bridge.masked(draft_logits)
    candidates = iter(rank_allowed(ranker, draft_logits, positions, samplings, masks))
    return [[next(candidates) for _ in state.growing.frontier] for state in states]


def rank_allowed(
    ranker: TokenRanker,
    draft_logits: torch.Tensor,
    positions: Sequence[int],
    samplings: Sequence[SamplingParameters],
    masks: Sequence[NDArray[np.uint8] | None],
) -> list[Candidates]:
    """Each row's best next tokens that its grammar allows, possibly none; a mask of None allows everything.

    `draft_logits` [R, V] float32 stay as they are; `positions` are those of the tokens to be chosen. One host sync.
    """
    masked = {index: bits for index, bits in enumerate(masks) if bits is not None and bits is not NOTHING_ALLOWED}
    if masked:
        draft_logits = draft_logits.clone()
        mask_forbidden_(draft_logits, [*masked], [*masked.values()])
    ranked = rank_candidates(ranker, draft_logits, positions, samplings, _NUM_CANDIDATES)
    return [
        candidates if bits is None else _allowed(candidates, may_follow=bits is not NOTHING_ALLOWED)
        for bits, candidates in zip(masks, ranked, strict=True)
    ]


def rank_candidates(
    ranker: TokenRanker,
    draft_logits: torch.Tensor,
    positions: Sequence[int],
    samplings: Sequence[SamplingParameters],
    num_candidates: int,
) -> list[Candidates]:
    """The best `num_candidates` next tokens of every row of `draft_logits` [R, V] float32; one host sync."""
    ranked = ranker.rank_tokens(draft_logits, positions, samplings, num_candidates)
    return [Candidates(token_ids, scores) for token_ids, scores in ranked]


def _allowed(candidates: Candidates, *, may_follow: bool) -> Candidates:
    """The best are allowed, and what is left of the ranking is not."""
    count = sum(score > _FORBIDDEN_SCORE for score in candidates.scores) if may_follow else 0
    return Candidates(candidates.token_ids[:count], candidates.scores[:count])
