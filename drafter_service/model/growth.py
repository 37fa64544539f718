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

from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.speculation.ranking import TokenRanker
from easyspec.speculation.token_tree import ScoredTree, TokenTree

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


def rank_candidates(
    ranker: TokenRanker,
    draft_logits: torch.Tensor,
    positions: Sequence[int],
    samplings: Sequence[SamplingParameters],
    num_candidates: int,
) -> list[Candidates]:
    """The best `num_candidates` next tokens of every row of `draft_logits` [R, V] float32; one host sync.

    `positions` are those of the tokens to be chosen, `samplings` the rows' requests.
    """
    ranked = ranker.rank_tokens(draft_logits, positions, samplings, num_candidates)
    return [Candidates(token_ids, scores) for token_ids, scores in ranked]


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
