"""Growing a draft tree level by level, under coupled sampling.

The verifier picks argmax(logits / T + noise); the drafter knows the noise, so it ranks candidates by
its own logits with the same noise. How far the base model's scores stray from the draft's is summed up in one
number per session, the sharpness: a candidate is chosen with probability about
softmax(sharpness x perturbed score), and a node with the product along its path. Sharpness is fitted online
from what was chosen. Nodes are expanded best first within a level, and the best of all levels are kept (as
EAGLE-2's dynamic tree does with raw probabilities).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from easyspec.speculation.growing_tree import GrowingTree
from easyspec.speculation.parameters import TreeBudget

# Where a session's sharpness begins, within what it stays, and how fast it follows the verdicts: best or near it on the
# bundled pair, greedy and sampled, with trees of 15 nodes (docs/decisions/0004).
_FIRST_SHARPNESS, _SHARPNESS_RANGE, _SHARPNESS_RATE = 2.0, (0.25, 4.0), 0.1


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


class Sharpness:
    """Online estimate of how well draft scores predict the base model's choice; one per session."""

    def __init__(self) -> None:
        self.value = _FIRST_SHARPNESS

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
        self.value = max(low, min(high, self.value + _SHARPNESS_RATE * gradient))


class LevelTree(GrowingTree):
    """One session's tree: every candidate so far, and the nodes to expand next.

    `expanded` maps a row to the candidates seen there; `frontier` holds the rows of the next level's expansion, in
    order. There is none once a level is expected to bring fewer than `least_gain` tokens.
    """

    def __init__(self, budget: TreeBudget, sharpness: Sharpness, least_gain: float = 0.0) -> None:
        super().__init__()
        self.budget = budget
        self._least_gain = least_gain
        self._sharpness = sharpness.value
        self.expanded: dict[int, Candidates] = {}
        self.frontier: list[int] = [0]

    @property
    def level(self) -> int:
        """Depth of the nodes to expand next; the root's is 0."""
        return self.depths[self.frontier[0]]

    def add_level(self, candidates: Sequence[Candidates]) -> None:
        """Attach the candidates of every frontier row and choose the next frontier among them."""
        is_last = self.level + 1 >= self.budget.num_levels
        added: list[int] = []
        for row, row_candidates in zip(self.frontier, candidates, strict=True):
            self.expanded[row] = row_candidates
            log_probabilities = row_candidates.log_probabilities(self._sharpness)
            for token_id, log_probability in zip(row_candidates.token_ids, log_probabilities, strict=True):
                added.append(self.add(row, token_id, self.log_values[row] + log_probability))
        added.sort(key=lambda row: (-self.log_values[row], row))
        self.frontier = [] if is_last else added[: self.budget.width]
        if self._least_gain > 0.0:
            # The children of a row are worth as much as the row, all together. What the tree would lose for them is at
            # least the worst of its best nodes, once there are more than the budget keeps.
            kept = heapq.nlargest(self.budget.num_nodes + 1, self.log_values[1:])
            least = math.exp(kept[-1]) if len(kept) > self.budget.num_nodes else 0.0
            if sum(max(0.0, math.exp(self.log_values[row]) - least) for row in self.frontier) < self._least_gain:
                self.frontier = []
