"""Candidates for the next level of several trees at once, under each request's noise and grammar.

Dimensions: `R` frontier rows of all trees, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drafter_service.model.growth import Candidates, rank_candidates
from drafter_service.model.level_mask import level_mask
from drafter_service.model.rounds import Drafting
from easyspec.speculation.ranking import TokenRanker

# Children looked at per row: the chance that the base model picks a later one is small. The same number for every
# session, so that a node's value does not depend on the budgets of others in the batch.
_NUM_CANDIDATES = 8


def rank_level(
    ranker: TokenRanker, draftings: Sequence[Drafting], draft_logits: torch.Tensor
) -> list[list[Candidates]]:
    """Per tree the candidates of every frontier row, whose logits stand in that order in `draft_logits` [R, V]."""
    positions: list[int] = []
    samplings = []
    for drafting in draftings:
        num_rows = len(drafting.tree.frontier)
        positions += [drafting.base_length + drafting.level] * num_rows
        samplings += [drafting.job.session.sampling] * num_rows
    mask = level_mask([(d.job.session.preference, d.job.session.token_ids, d.tree) for d in draftings])
    if draftings and (bridge := draftings[0].state.bridge) is not None:
        draft_logits = bridge.masked(draft_logits)
    draft_logits = mask.applied(draft_logits)
    candidates = mask.kept(rank_candidates(ranker, draft_logits, positions, samplings, _NUM_CANDIDATES))
    ranked = []
    for drafting in draftings:
        count = len(drafting.tree.frontier)
        ranked.append(candidates[:count])
        candidates = candidates[count:]
    return ranked
