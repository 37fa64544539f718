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

from easyspec.speculation.coupling import gumbel_noise
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.speculation.token_tree import ScoredTree, TokenTree

# Above this many entries only the likeliest tokens get noise; the rest hardly ever wins.
MAX_NOISED_TOKENS = 8192
_INITIAL_SHARPNESS = 1.0
_SHARPNESS_RANGE = (0.25, 4.0)
_LEARNING_RATE = 0.02


@dataclass(frozen=True)
class Candidates:
    """The best next tokens of one row, best first: token ids and perturbed scores."""

    token_ids: tuple[int, ...]
    scores: tuple[float, ...]

    def log_probabilities(self, sharpness: float) -> list[float]:
        """log softmax(sharpness x score) over the kept candidates."""
        top = self.scores[0]
        total = math.log(sum(math.exp(sharpness * (score - top)) for score in self.scores))
        return [sharpness * (score - top) - total for score in self.scores]


class Sharpness:
    """Online estimate of how well draft scores predict the base model's choice; one per session."""

    def __init__(self) -> None:
        self.value = _INITIAL_SHARPNESS

    def observe(self, candidates: Candidates, chosen_token_id: int) -> None:
        """One step up the log-likelihood of the choice; a choice outside the candidates counts as the last one."""
        log_probabilities = candidates.log_probabilities(self.value)
        expected = sum(
            math.exp(log_p) * score for log_p, score in zip(log_probabilities, candidates.scores, strict=True)
        )
        is_known = chosen_token_id in candidates.token_ids
        index = candidates.token_ids.index(chosen_token_id) if is_known else -1
        gradient = max(-5.0, min(5.0, candidates.scores[index] - expected))
        low, high = _SHARPNESS_RANGE
        self.value = max(low, min(high, self.value + _LEARNING_RATE * gradient))


def rank_candidates(
    draft_logits: torch.Tensor, positions: Sequence[int], samplings: Sequence[SamplingParameters], num_candidates: int
) -> list[Candidates]:
    """The best `num_candidates` next tokens of every row of `draft_logits` [R, V] float32; one host sync.

    `positions` are those of the tokens to be chosen, `samplings` the rows' requests.
    """
    scores = _perturbed_scores(draft_logits, positions, samplings)
    best = scores.topk(min(num_candidates, scores.shape[-1]), dim=-1)
    packed = torch.stack([best.values.double(), best.indices.double()]).tolist()  # exact: ids are far below 2**53
    return [
        Candidates(tuple(int(token_id) for token_id in token_ids), tuple(row_scores))
        for row_scores, token_ids in zip(packed[0], packed[1], strict=True)
    ]


def _perturbed_scores(
    draft_logits: torch.Tensor, positions: Sequence[int], samplings: Sequence[SamplingParameters]
) -> torch.Tensor:
    """log q / T + noise for sampled rows, log q for greedy ones (up to a constant per row), [R, V]."""
    sampled = [row for row, sampling in enumerate(samplings) if not sampling.is_greedy]
    if not sampled:
        return draft_logits
    scores = draft_logits.clone()
    device = draft_logits.device
    for sampling_row_group in _by_noise(sampled, positions, samplings):
        first = sampling_row_group[0]
        rows = torch.tensor(sampling_row_group, device=device)
        scaled = draft_logits[rows] / samplings[first].temperature
        seed = torch.tensor([_as_int64(samplings[first].seed)], device=device)
        position = torch.tensor([positions[first]], device=device)
        if scaled.shape[-1] <= MAX_NOISED_TOKENS:
            noised = scaled + gumbel_noise(seed, position, torch.arange(scaled.shape[-1], device=device))
        else:
            top = scaled.topk(MAX_NOISED_TOKENS // 8, dim=-1)
            count = len(sampling_row_group)
            noise = gumbel_noise(seed.expand(count), position.expand(count), top.indices)
            noised = torch.full_like(scaled, -torch.inf).scatter_(1, top.indices, top.values + noise)
        scores[rows] = noised
    return scores


def _by_noise(
    rows: Sequence[int], positions: Sequence[int], samplings: Sequence[SamplingParameters]
) -> list[list[int]]:
    """Rows that share seed, position and temperature (the nodes of one level of one session) share their noise."""
    groups: dict[tuple[int, int, float], list[int]] = {}
    for row in rows:
        key = (samplings[row].seed, positions[row], samplings[row].temperature)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _as_int64(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


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

    def scored(self) -> ScoredTree:
        """Everything seen so far, with values."""
        return ScoredTree(TokenTree(tuple(self.token_ids), tuple(self.parent_rows)), tuple(self.log_values))
