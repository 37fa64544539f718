"""Candidates for the next level of several trees at once, under each request's noise and grammar.

Dimensions: `R` frontier rows of all trees, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drafter_service.growth import Candidates, draw_noise, rank_candidates
from drafter_service.level_mask import level_mask
from drafter_service.sources.rounds import Drafting

# Children looked at per row: the chance that the base model picks a later one is small. The same number for every
# session, so that a node's value does not depend on the budgets of others in the batch.
_NUM_CANDIDATES = 8
# Up to this many tokens noise is drawn for all of them, once a round; beyond, for the likeliest of each row.
_MAX_NOISED_VOCABULARY = 8192


def draw_round_noise(draftings: Sequence[Drafting], vocab_size: int, device: torch.device) -> None:
    """The noise of the rounds that begin, where somebody samples and it is little enough to draw all of it."""
    sampled = [drafting for drafting in draftings if not drafting.job.session.sampling.is_greedy]
    if not sampled or vocab_size > _MAX_NOISED_VOCABULARY:
        return
    drawn = draw_noise(
        [drafting.job.session.sampling for drafting in sampled],
        [drafting.base_length for drafting in sampled],
        [drafting.job.budget.num_levels for drafting in sampled],
        vocab_size,
        device,
    )
    for drafting, noise in zip(sampled, drawn, strict=True):
        drafting.noise = noise


def rank_level(draftings: Sequence[Drafting], draft_logits: torch.Tensor) -> list[list[Candidates]]:
    """Per tree the candidates of every frontier row, whose logits stand in that order in `draft_logits` [R, V]."""
    positions: list[int] = []
    samplings = []
    for drafting in draftings:
        num_rows = len(drafting.tree.frontier)
        positions += [drafting.base_length + drafting.level] * num_rows
        samplings += [drafting.job.session.sampling] * num_rows
    mask = level_mask([(d.job.session.preference, d.job.session.token_ids, d.tree) for d in draftings])
    draft_logits, noise = mask.applied(draft_logits), _level_noise(draftings)
    candidates = mask.kept(rank_candidates(draft_logits, positions, samplings, _NUM_CANDIDATES, noise))
    ranked = []
    for drafting in draftings:
        count = len(drafting.tree.frontier)
        ranked.append(candidates[:count])
        candidates = candidates[count:]
    return ranked


def _level_noise(draftings: Sequence[Drafting]) -> torch.Tensor | None:
    """The noise of every frontier row, [rows, V]; that of a greedy one is anybody's."""
    drawn = next((drafting.noise for drafting in draftings if drafting.noise is not None), None)
    if drawn is None:
        return None
    levels = [
        (drawn[0] if drafting.noise is None else drafting.noise[drafting.level]).expand(len(drafting.tree.frontier), -1)
        for drafting in draftings
    ]
    return torch.cat(levels)
