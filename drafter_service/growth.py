"""Growing a draft tree level by level, under coupled sampling.

The verifier picks argmax(logits / T + noise); the drafter knows the noise, so it ranks candidates by
its own logits with the same noise. How far the base model's scores stray from the draft's is summed up in one
number per session, the sharpness: a candidate is chosen with probability about
softmax(sharpness x perturbed score), and a node with the product along its path. Sharpness is fitted online
from what was chosen. Nodes are expanded best first within a level, and the best of all levels are kept (as
EAGLE-2's dynamic tree does with raw probabilities).

Dimensions: `R` expanded rows, `V` vocabulary, `K` candidates kept per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from easyspec.speculation.coupling import gumbel_noise, signed_seed
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.speculation.token_tree import ScoredTree, TokenTree
from easyspec.speculation.transfer import to_device

# Only the likeliest tokens of a row get noise: one further down hardly ever wins, and guesses may be wrong.
NUM_NOISED_TOKENS = 256
# The smallest normal float32, and a score whose multiples stay finite: division by a tiny temperature overflows.
_MIN_TEMPERATURE = 2.0**-126
_MIN_SCORE = -1e30
_SHARPNESS_RANGE = (0.25, 4.0)


@dataclass(frozen=True)
class Candidates:
    """The best next tokens of one row, best first: token ids and perturbed scores. None where nothing may follow."""

    token_ids: tuple[int, ...]
    scores: tuple[float, ...]

    def log_probabilities(self, sharpness: float) -> list[float]:
        """log softmax(sharpness x score) over the kept candidates, if there are any."""
        if not self.scores:
            return []
        top = self.scores[0]
        total = math.log(sum(math.exp(sharpness * (score - top)) for score in self.scores))
        return [sharpness * (score - top) - total for score in self.scores]


@dataclass(frozen=True)
class RankingSettings:
    """Where a session's sharpness starts and how fast it follows the verdicts (docs/decisions/0004)."""

    initial_sharpness: float = 2.0
    learning_rate: float = 0.1


DEFAULT_RANKING = RankingSettings()


class Sharpness:
    """Online estimate of how well draft scores predict the base model's choice; one per session."""

    def __init__(self, settings: RankingSettings = DEFAULT_RANKING) -> None:
        self.value = settings.initial_sharpness
        self._learning_rate = settings.learning_rate

    def observe(self, candidates: Candidates, chosen_token_id: int) -> None:
        """One step up the log-likelihood of the choice; a choice outside the candidates counts as the last one."""
        if not candidates.scores:
            return
        log_probabilities = candidates.log_probabilities(self.value)
        expected = sum(
            math.exp(log_p) * score for log_p, score in zip(log_probabilities, candidates.scores, strict=True)
        )
        is_known = chosen_token_id in candidates.token_ids
        index = candidates.token_ids.index(chosen_token_id) if is_known else -1
        gradient = max(-5.0, min(5.0, candidates.scores[index] - expected))
        low, high = _SHARPNESS_RANGE
        self.value = max(low, min(high, self.value + self._learning_rate * gradient))


def draw_noise(
    samplings: Sequence[SamplingParameters],
    first_positions: Sequence[int],
    num_levels: Sequence[int],
    vocab_size: int,
    device: torch.device,
) -> list[torch.Tensor]:
    """Per request the noise of its next positions for all tokens, [levels, V]: a small vocabulary's is cheap in one
    call for a whole round."""
    counts = list(num_levels)
    seeds = [
        signed_seed(sampling.seed) for sampling, count in zip(samplings, counts, strict=True) for _ in range(count)
    ]
    positions = [first + level for first, count in zip(first_positions, counts, strict=True) for level in range(count)]
    noise = gumbel_noise(
        to_device(seeds, torch.int64, device),
        to_device(positions, torch.int64, device),
        torch.arange(vocab_size, device=device),
    )
    return list(noise.split(counts))


def rank_candidates(
    draft_logits: torch.Tensor,
    positions: Sequence[int],
    samplings: Sequence[SamplingParameters],
    num_candidates: int,
    noise: torch.Tensor | None = None,
) -> list[Candidates]:
    """The best `num_candidates` next tokens of every row of `draft_logits` [R, V] float32; one host sync.

    `positions` are those of the tokens to be chosen, `samplings` the rows' requests. Without `noise` [R, V] drawn
    before (that of a greedy row may be any), only each row's likeliest tokens get noise.
    """
    num_tokens = draft_logits.shape[-1]
    is_any_sampled = not all(sampling.is_greedy for sampling in samplings)
    if is_any_sampled and noise is not None:
        ranked = _perturbed(draft_logits, noise, samplings)
        best = ranked.topk(min(num_candidates, num_tokens), dim=-1)
        scores, token_ids = best.values, best.indices
    else:
        likeliest = draft_logits.topk(min(NUM_NOISED_TOKENS if is_any_sampled else num_candidates, num_tokens), dim=-1)
        scores, token_ids = likeliest.values, likeliest.indices
        if is_any_sampled:
            seeds = to_device([signed_seed(sampling.seed) for sampling in samplings], torch.int64, scores.device)
            row_noise = gumbel_noise(seeds, to_device(positions, torch.int64, scores.device), token_ids)
            best = _perturbed(scores, row_noise, samplings).topk(min(num_candidates, num_tokens), dim=-1)
            scores, token_ids = best.values, token_ids.gather(1, best.indices)
    packed = torch.stack([scores.double(), token_ids.double()]).tolist()  # exact: ids are far below 2**53
    return [
        Candidates(tuple(int(token_id) for token_id in row_token_ids), tuple(row_scores))
        for row_scores, row_token_ids in zip(packed[0], packed[1], strict=True)
    ]


def _perturbed(logits: torch.Tensor, noise: torch.Tensor, samplings: Sequence[SamplingParameters]) -> torch.Tensor:
    """logits / T + noise for sampled rows and logits for greedy ones, all [R, K].

    Each row is relative to its best logit, and finite at whatever temperature.
    """
    divisors = [1.0 if sampling.is_greedy else max(sampling.temperature, _MIN_TEMPERATURE) for sampling in samplings]
    temperatures = to_device(divisors, torch.float32, logits.device)[:, None]
    scaled = ((logits - logits.amax(dim=-1, keepdim=True)) / temperatures).clamp_(min=_MIN_SCORE)
    if any(sampling.is_greedy for sampling in samplings):
        is_sampled = [not sampling.is_greedy for sampling in samplings]
        noise = noise * to_device(is_sampled, torch.bool, logits.device)[:, None]
    return scaled + noise


class GrowingTree:
    """One session's tree while it grows: every candidate so far, and the nodes to expand next.

    Row 0 is the root. `expanded` maps a row to the candidates seen there; `frontier` holds the rows of
    the next level's expansion, in order.
    """

    def __init__(self, budget: TreeBudget, sharpness: Sharpness) -> None:
        self._budget = budget
        self._sharpness = sharpness.value
        self.token_ids: list[int] = []
        self.parent_rows: list[int] = []
        self.log_values: list[float] = []
        self.depths = [0]
        self.expanded: dict[int, Candidates] = {}
        self.frontier: list[int] = [0]

    def add_level(self, candidates: Sequence[Candidates]) -> None:
        """Attach the candidates of every frontier row and choose the next frontier among them."""
        added: list[int] = []
        for row, row_candidates in zip(self.frontier, candidates, strict=True):
            self.expanded[row] = row_candidates
            row_value = self.log_values[row - 1] if row > 0 else 0.0
            log_probabilities = row_candidates.log_probabilities(self._sharpness)
            for token_id, log_probability in zip(row_candidates.token_ids, log_probabilities, strict=True):
                self.token_ids.append(token_id)
                self.parent_rows.append(row)
                self.log_values.append(row_value + log_probability)
                self.depths.append(self.depths[row] + 1)
                added.append(len(self.token_ids))
        added.sort(key=lambda row: (-self.log_values[row - 1], row))
        is_last = self.depths[self.frontier[0]] + 1 >= self._budget.num_levels
        self.frontier = [] if is_last else added[: self._budget.width]

    def path_token_ids(self, row: int) -> tuple[int, ...]:
        """The tokens from the root's child down to `row`; none for the root itself."""
        path: list[int] = []
        while row > 0:
            path.append(self.token_ids[row - 1])
            row = self.parent_rows[row - 1]
        return tuple(reversed(path))

    def scored(self) -> ScoredTree:
        """Everything seen so far, with values."""
        return ScoredTree(TokenTree(tuple(self.token_ids), tuple(self.parent_rows)), tuple(self.log_values))
