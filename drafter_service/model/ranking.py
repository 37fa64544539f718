"""Candidates for the next level of several trees at once, under each request's noise and grammar.

Dimensions: `R` frontier rows of all trees, `V` vocabulary, `N` tokens that the draft model names.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from drafter_service.grammar_preference import NOTHING_ALLOWED
from drafter_service.model.growth import Candidates
from drafter_service.model.state import ModelState
from easyspec.model.draft_vocabulary import DraftVocabulary
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.ranking import TokenRanker
from easyspec.speculation.token_mask import mask_forbidden_

# Children looked at per row: the chance that the base model picks a later one is small. The same number for every
# session, so that a node's value does not depend on the budgets of others in the batch.
_NUM_CANDIDATES = 8
# Scores of forbidden tokens are below, those of others far above.
_FORBIDDEN_SCORE = -1e29


def rank_level(
    ranker: TokenRanker,
    states: Sequence[ModelState],
    draft_logits: torch.Tensor,
    vocabulary: DraftVocabulary | None = None,
) -> list[list[Candidates]]:
    """Per tree the best next tokens that may follow each frontier row, possibly none.

    Rows stand in that order in `draft_logits` float32 [R, N], which stay as they are; the columns are the tokens of
    `vocabulary`, or all. One host sync.
    """
    rows = [(state, row) for state in states for row in state.growing.frontier]
    masks: list[NDArray[np.uint8] | None] = []
    for state in states:
        tree, preference = state.growing, state.request.preference
        paths = [] if preference is None else [tree.path_token_ids(row) for row in tree.frontier]
        masks += [None] * len(tree.frontier) if preference is None else preference.allowed_after(state.token_ids, paths)
    masked = {index: bits for index, bits in enumerate(masks) if bits is not None and bits is not NOTHING_ALLOWED}
    bridge = states[0].bridge if states else None
    if vocabulary is not None and (masked or bridge is not None):
        draft_logits, vocabulary = vocabulary.spread(draft_logits), None
    if bridge is not None:
        draft_logits = bridge.masked(draft_logits)
    if masked:
        draft_logits = draft_logits.clone()
        mask_forbidden_(draft_logits, [*masked], [*masked.values()])
    positions = [len(state.token_ids) + state.growing.depths[row] for state, row in rows]
    samplings = [state.request.sampling for state, _ in rows]
    ranked = rank_candidates(ranker, draft_logits, positions, samplings, _NUM_CANDIDATES, vocabulary)
    for index, bits in enumerate(masks):
        if bits is not None:  # what a grammar allows comes first
            scores = () if bits is NOTHING_ALLOWED else ranked[index].scores
            count = sum(score > _FORBIDDEN_SCORE for score in scores)
            ranked[index] = Candidates(ranked[index].token_ids[:count], scores[:count])
    by_row = iter(ranked)
    return [[*itertools.islice(by_row, len(state.growing.frontier))] for state in states]


def rank_candidates(
    ranker: TokenRanker,
    draft_logits: torch.Tensor,
    positions: Sequence[int],
    samplings: Sequence[SamplingParameters],
    num_candidates: int,
    vocabulary: DraftVocabulary | None = None,
) -> list[Candidates]:
    """The best `num_candidates` next tokens of every row of `draft_logits` [R, N] float32; one host sync."""
    named_ids = None if vocabulary is None else vocabulary.token_ids
    ranked = ranker.rank_tokens(draft_logits, positions, samplings, num_candidates, named_ids)
    return [Candidates(token_ids, scores) for token_ids, scores in ranked]
