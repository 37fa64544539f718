"""The best next tokens of a draft model's rows, under the noise that the verifier will use.

Dimensions: `R` rows, `N` tokens that the model names, `K` candidates kept per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch

from easyspec.speculation.coupling import gumbel_noise, signed_seed
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.transfer import to_device

# Only the likeliest tokens of a row get noise: one further down hardly ever wins, and guesses may be wrong.
NUM_NOISED_TOKENS = 256
# The smallest normal float32, and a score whose multiples stay finite: division by a tiny temperature overflows.
_MIN_TEMPERATURE = 2.0**-126
_MIN_SCORE = -1e30

RankedTokens: TypeAlias = tuple[tuple[int, ...], tuple[float, ...]]  # token ids and scores, best first


class TokenRanker(Protocol):
    """What ranks tokens; an executor."""

    def rank_tokens(
        self,
        logits: torch.Tensor,
        positions: Sequence[int],
        samplings: Sequence[SamplingParameters],
        num_best: int,
        named_ids: torch.Tensor | None = None,
    ) -> list[RankedTokens]:
        """See the function `rank_tokens`."""


def rank_tokens(
    logits: torch.Tensor,
    positions: Sequence[int],
    samplings: Sequence[SamplingParameters],
    num_best: int,
    named_ids: torch.Tensor | None = None,
) -> list[RankedTokens]:
    """Each row's best tokens by logit / T + noise, or by logit where it is greedy; `logits` float32 [R, N].

    `named_ids` int64 [N] are the tokens of the columns, rising; None: all of the vocabulary. A sampled row's scores are
    relative to its best logit, and finite at whatever temperature. One host sync.
    """
    num_tokens = logits.shape[-1]
    is_any_sampled = not all(sampling.is_greedy for sampling in samplings)
    best = logits.topk(min(NUM_NOISED_TOKENS if is_any_sampled else num_best, num_tokens), dim=-1)
    scores, token_ids = best.values, best.indices if named_ids is None else named_ids[best.indices]
    if is_any_sampled:
        seeds = to_device([signed_seed(sampling.seed) for sampling in samplings], torch.int64, scores.device)
        noise = gumbel_noise(seeds, to_device(positions, torch.int64, scores.device), token_ids)
        # logits / T + noise for sampled rows and logits for greedy ones, all [R, K], relative to each row's best logit.
        divisors = [
            1.0 if sampling.is_greedy else max(sampling.temperature, _MIN_TEMPERATURE) for sampling in samplings
        ]
        temperatures = to_device(divisors, torch.float32, scores.device)[:, None]
        scaled = ((scores - scores.amax(dim=-1, keepdim=True)) / temperatures).clamp_(min=_MIN_SCORE)
        is_sampled = [not sampling.is_greedy for sampling in samplings]
        if not all(is_sampled):
            noise = noise * to_device(is_sampled, torch.bool, scores.device)[:, None]
        best = (scaled + noise).topk(min(num_best, num_tokens), dim=-1)
        scores, token_ids = best.values, token_ids.gather(1, best.indices)
    packed = torch.stack([scores.double(), token_ids.double()]).tolist()  # exact: ids are far below 2**53
    return [
        (tuple(int(token_id) for token_id in row_token_ids), tuple(row_scores))
        for row_scores, row_token_ids in zip(packed[0], packed[1], strict=True)
    ]
