"""Top-k, top-p and min-p over rows of scores.

Dimension key: `F` rows, `V` vocabulary.

Scores are logits over temperature, relative to the row's best, which is 0. The filters apply in the order of the
title; each keeps or drops tokens of equal score together and always keeps the best:

* top-k keeps what reaches the k-th best score;
* top-p keeps what reaches the last score of the smallest prefix, in descending order, whose probabilities
  (renormalised after top-k) sum to top_p;
* min-p keeps what reaches min_p times the best probability.

Probabilities are summed as integers, in units of 2^-40 of the best one: such sums do not depend on their order, so
neither the batch nor the device changes where a row is cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.transfer import is_remote, to_device

# Sums of 2^22 probabilities fit int64.
_PROBABILITY_UNITS = 2.0**40
# A prefix is looked for among a row's best 64 tokens, then among 32 times as many: sorting wide rows is 20x slower.
_NUM_PREFIX_CANDIDATES = 64


def has_filters(sampling: SamplingParameters, vocab_size: int) -> bool:
    """True if a filter may drop a token."""
    return (sampling.top_k or vocab_size) < vocab_size or sampling.top_p < 1.0 or sampling.min_p > 0.0


def filter_scores_(scores: Tensor, samplings: Sequence[SamplingParameters]) -> None:
    """Set what the filters drop to -inf; `scores` is float32 [F, V], `samplings` one per row."""
    vocab_size, device = scores.shape[1], scores.device
    top_ks = [min(sampling.top_k or vocab_size, vocab_size) for sampling in samplings]
    limited = [index for index, top_k in enumerate(top_ks) if top_k < vocab_size]
    if limited:
        index = to_device(limited, torch.int64, device)
        ranks = to_device([[top_ks[i] - 1] for i in limited], torch.int64, device)
        best = scores[index].topk(max(top_ks[i] for i in limited)).values
        _drop_below_(scores, index, best.gather(1, ranks))
    nuclei = [index for index, sampling in enumerate(samplings) if sampling.top_p < 1.0]
    if nuclei:
        index = to_device(nuclei, torch.int64, device)
        top_ps = to_device([[samplings[i].top_p] for i in nuclei], torch.float64, device)
        own = scores[index]
        total = _probability_units(own).sum(-1, keepdim=True)
        needed = (total * top_ps).ceil().to(torch.int64).clamp(min=1)
        # The product is rounded: it must not ask for more than there is.
        needed = torch.minimum(needed, total)
        # Only a CPU may look at a result in between; a GPU sorts whole rows quickly.
        num_candidates = vocab_size if is_remote(scores) else _NUM_PREFIX_CANDIDATES
        _drop_below_(scores, index, _prefix_cutoffs(own, needed, num_candidates))
    floored = [index for index, sampling in enumerate(samplings) if sampling.min_p > 0.0]
    if floored:
        cutoffs = [[math.log(samplings[i].min_p)] for i in floored]
        index = to_device(floored, torch.int64, device)
        _drop_below_(scores, index, to_device(cutoffs, torch.float32, device))


def _drop_below_(scores: Tensor, index: Tensor, cutoffs: Tensor) -> None:
    if len(index) == len(scores):
        scores.masked_fill_(scores < cutoffs, -torch.inf)
    else:
        part = scores[index]
        scores[index] = part.masked_fill_(part < cutoffs, -torch.inf)


def _prefix_cutoffs(scores: Tensor, needed: Tensor, num_candidates: int) -> Tensor:
    """The last score of each row's smallest prefix of the mass that is needed; [F, 1]."""
    num_candidates = min(num_candidates, scores.shape[1])
    best = scores.topk(num_candidates).values
    last = (_probability_units(best).cumsum(-1) < needed).sum(-1, keepdim=True)  # [F, 1]
    cutoffs = best.gather(1, last.clamp(max=num_candidates - 1))
    if num_candidates < scores.shape[1]:
        short = (last.squeeze(1) == num_candidates).nonzero().squeeze(1)
        if len(short):
            cutoffs[short] = _prefix_cutoffs(scores[short], needed[short], 32 * num_candidates)
    return cutoffs


def _probability_units(scores: Tensor) -> Tensor:
    return scores.exp().mul_(_PROBABILITY_UNITS).to(torch.int64)
