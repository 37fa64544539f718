"""What a session drafts ahead: guesses at the verdict that is awaited, and the trees that grow behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    """A verdict that may come: tokens of a path of the tree, and a bonus token; `state` stands behind it.

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
        """The slot of the bonus token, once it has one: before the pass that reads it, which may fail."""
        slots = self.state.slots
        return [] if self.state.num_uncached else [int(slots.by_position[slots.num_cached - 1])]


@dataclass(eq=False)
class Ahead:
    """`slots` are those of rows of the tree that was sent, parents first, which the trunk has behind the committed
    tokens. Once `is_read`, their K and V are exact, and there are guesses.
    """

    memory: KvMemory
    sent: ScoredTree
    budget: TreeBudget
    slots: dict[int, int]
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

    def guess(self, state: ModelState, candidates: Mapping[int, Candidates], num_guesses: int) -> None:
        """The tree is read: `candidates` may come after each row. Guess the verdicts that are likeliest: a path down to
        a row, and then a token that the tree does not have there."""
        self.is_read = True
        ranked: list[tuple[float, int, int]] = []
        for row, after in candidates.items():
            reach = self.sent.log_values[row - 1] if row else 0.0
            known = self.sent.tree.children[row]
            log_probabilities = after.log_probabilities(state.sharpness.value)
            for token_id, log_probability in zip(after.token_ids, log_probabilities, strict=True):
                value = math.exp(reach + log_probability)
                if token_id not in known and value >= _LEAST_PROBABILITY:
                    ranked.append((-value, row, token_id))
        for _, row, token_id in sorted(ranked)[:num_guesses]:
            path = self.sent.tree.path_rows(row)
            tokens = [self.sent.tree.token_ids[above - 1] for above in path]
            branch = state.branch([*tokens, token_id], [self.slots[above] for above in path])
            branch.tree = LevelTree(self.budget, state.sharpness, state.least_gain)
            branch.drafting = Drafting()
            self.guesses.append(Guess(len(path), branch))

    def take_up(self, state: ModelState, said: Sequence[int], budget: TreeBudget) -> bool:
        """Move what has come true into the session, and free the rest; True if the verdict `said` was guessed."""
        is_alike = (budget.num_levels, budget.width) == (self.budget.num_levels, self.budget.width)
        hit = next((guess for guess in self.guesses if guess.is_read and guess.said == [*said]), None)
        hit = hit if is_alike else None
        if self.is_read:
            accepted = [child for _, _, child in follow(self.sent.tree, said[:-1])]
            state.slots.append([self.slots.pop(row) for row in accepted if row in self.slots])
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
        self.memory.free([*self.slots.values()])
        self.guesses, self.slots = [], {}


def likeliest_rows(sent: ScoredTree, most_rows: int) -> list[int]:
    """The most valuable rows, parents first: a child is never worth more than its parent."""
    order = sorted(range(1, len(sent.tree) + 1), key=lambda row: (-sent.log_values[row - 1], row))
    return sorted(order[:most_rows])
