"""What a session drafts ahead: guesses at the verdict that is awaited, and the trees that grow behind them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from drafter_service.model.growth import Candidates, LevelTree
from drafter_service.model.state import Drafting, ModelState
from easyspec.model.kv_cache import KvMemory
from easyspec.speculation.growing_tree import follow
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.token_tree import ScoredTree

# Guesses that are less likely than this are not worth their rows.
_LEAST_PROBABILITY = 0.02


@dataclass(eq=False)
class Guess:
    """A verdict that may come: `num_accepted` tokens of the path and a bonus token; `state` stands behind it.

    Once `is_read`, the bonus token has a slot of its own, and the tree its first level.
    """

    num_accepted: int
    state: ModelState
    is_read: bool = False

    @property
    def said(self) -> list[int]:
        """The tokens of the verdict."""
        return self.state.token_ids[len(self.state.token_ids) - self.num_accepted - 1 :]

    @property
    def bonus_slot(self) -> list[int]:
        """The slot of the bonus token, once it is read."""
        return [int(self.state.slots.by_position[self.state.slots.num_cached - 1])] if self.is_read else []


@dataclass(eq=False)
class Ahead:
    """`path` are rows of the tree that was sent; the trunk has their tokens behind the committed ones, in `path_slots`.

    Once `is_read`, K and V of the path are exact, and there are guesses.
    """

    memory: KvMemory
    sent: ScoredTree
    budget: TreeBudget
    path: tuple[int, ...]
    path_slots: list[int]
    trunk: ModelState
    guesses: list[Guess] = field(default_factory=list)
    is_read: bool = False

    @property
    def unread(self) -> list[Guess]:
        """Guesses whose bonus token is to be read."""
        return [guess for guess in self.guesses if not guess.is_read]

    @property
    def growing(self) -> list[Guess]:
        """Guesses whose trees are not full."""
        return [guess for guess in self.guesses if guess.is_read and guess.state.growing.frontier]

    def guess(self, state: ModelState, candidates: Sequence[Candidates], num_guesses: int) -> None:
        """The path is read: `candidates` may come after its root and after each of its tokens. Guess the verdicts that
        are likeliest: a part of the path, and then a token that the tree does not have there."""
        self.is_read = True
        ranked: list[tuple[float, int, int]] = []
        for num_accepted, (row, after) in enumerate(zip((0, *self.path), candidates, strict=True)):
            reach = self.sent.log_values[row - 1] if row else 0.0
            known = self.sent.tree.children[row]
            log_probabilities = after.log_probabilities(state.sharpness.value)
            for token_id, log_probability in zip(after.token_ids, log_probabilities, strict=True):
                value = math.exp(reach + log_probability)
                if token_id not in known and value >= _LEAST_PROBABILITY:
                    ranked.append((-value, num_accepted, token_id))
        tokens = [self.sent.tree.token_ids[row - 1] for row in self.path]
        for _, num_accepted, token_id in sorted(ranked)[:num_guesses]:
            branch = state.branch([*tokens[:num_accepted], token_id], self.path_slots[:num_accepted])
            branch.tree = LevelTree(self.budget, state.sharpness, state.least_gain)
            branch.drafting = Drafting()
            self.guesses.append(Guess(num_accepted, branch))

    def take_up(self, state: ModelState, said: Sequence[int], budget: TreeBudget) -> bool:
        """Move what has come true into the session, and free the rest; True if the verdict `said` was guessed."""
        is_alike = (budget.num_levels, budget.width) == (self.budget.num_levels, self.budget.width)
        hit = next((guess for guess in self.guesses if guess.is_read and guess.said == [*said]), None)
        hit = hit if is_alike else None
        if self.is_read:
            steps = follow(self.sent.tree, said[:-1])
            num_accepted = sum(child in self.path for _, _, child in steps)
            state.slots.append(self.path_slots[:num_accepted])
            self.path_slots = self.path_slots[num_accepted:]
        if hit is not None:
            state.slots.append(hit.bonus_slot)
            state.tree, state.tree_slots, state.drafting = hit.state.tree, hit.state.tree_slots, hit.state.taken_over()
            self.guesses.remove(hit)
        state.num_exact = state.slots.num_cached
        self.drop()
        return hit is not None

    def drop(self) -> None:
        """Free what was taken; idempotent."""
        for guess in self.guesses:
            self.memory.free(guess.bonus_slot)
            guess.state.drop_tree()
        self.memory.free(self.path_slots)
        self.guesses, self.path_slots = [], []


def likeliest_path(sent: ScoredTree) -> tuple[int, ...]:
    """Rows from the root's child down, the most valuable child each time."""
    best: dict[int, int] = {}
    for row, parent_row in enumerate(sent.tree.parent_rows, start=1):
        known = best.get(parent_row)
        if known is None or sent.log_values[row - 1] > sent.log_values[known - 1]:
            best[parent_row] = row
    path = [0]
    while path[-1] in best:
        path.append(best[path[-1]])
    return tuple(path[1:])
