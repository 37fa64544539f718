"""Drafting ahead: the next tree, begun while the last one is being verified.

A verdict is a path of the tree and then a token that the tree does not have there. So the likeliest rows of the tree
are read exactly, as a calibration would read them, which says what may come after each; the likeliest pairs of (path,
bonus token) are guesses at the verdict, each the root of a tree that grows beside the others', as rows of one pass.
If the verdict is among them, its tree is the session's, as far as it has grown; else
what was read of the accepted tokens is kept, and the session drafts as ever. As the noise of the verifier's choice is
known here, the bonus token can be guessed as well as any other. A wrong guess cannot change the output.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from drafter_service.model.drafting import ModelDrafting
from drafter_service.model.growth import Candidates, LevelTree
from drafter_service.model.ranking import rank_level
from drafter_service.model.state import ModelState
from easyspec.model.kv_cache import KvMemory
from easyspec.model.row_layout import Segment, lay_out
from easyspec.speculation.growing_tree import follow
from easyspec.speculation.messages import DraftTimings
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.token_tree import ScoredTree

# Rows of the tree that are read: verdicts that end elsewhere are not guessed. A pass of so many rows takes little more
# time than one of a few.
_MOST_ROWS = 8
# Guesses that are less likely than this are not worth their rows.
_LEAST_PROBABILITY = 0.02


@dataclass(eq=False)
class Ahead:
    """What one session drafts ahead. `slots` are those of rows of the tree that was sent, parents first, which the
    `trunk` has behind the committed tokens. Once `is_read`, their K and V are exact, and there are guesses.

    `guesses`: by the tokens of a verdict that may come, the session as it would be behind it. Once the bonus token has
    a slot of its own, it is read, and the tree has its first level.
    """

    memory: KvMemory
    sent: ScoredTree
    budget: TreeBudget
    slots: dict[int, int]
    trunk: ModelState
    guesses: dict[tuple[int, ...], ModelState] = field(default_factory=dict)
    is_read: bool = False

    def guess(self, state: ModelState, candidates: Mapping[int, Candidates], num_guesses: int) -> None:
        """The tree is read: `candidates` may come after each row. Guess the verdicts that are likeliest: a path down to
        a row, and then a token that the tree does not have there."""
        self.is_read = True
        tree = self.sent.tree
        ranked: list[tuple[float, int, int]] = []
        for row, after in candidates.items():
            reach = self.sent.log_values[row - 1] if row else 0.0
            log_probabilities = after.log_probabilities(state.sharpness.value)
            for token_id, log_probability in zip(after.token_ids, log_probabilities, strict=True):
                value = math.exp(reach + log_probability)
                if tree.child(row, token_id) is None and value >= _LEAST_PROBABILITY:
                    ranked.append((-value, row, token_id))
        for _, row, token_id in sorted(ranked)[:num_guesses]:
            path = tree.path_rows(row)
            said = (*(tree.token_ids[above - 1] for above in path), token_id)
            self.guesses[said] = branch = state.branch(said, [self.slots[above] for above in path])
            branch.tree = LevelTree(self.budget, state.sharpness, state.least_gain)
            branch.timings = DraftTimings()

    def take_up(self, state: ModelState, said: Sequence[int], budget: TreeBudget) -> None:
        """Move into the session, which has begun its next tree, what of this the verdict `said` made true; free the
        rest."""
        is_alike = (budget.num_levels, budget.width) == (self.budget.num_levels, self.budget.width)
        hit = self.guesses.get(tuple(said)) if is_alike else None
        if self.is_read:
            accepted = [child for _, _, child in follow(self.sent.tree, said[:-1])]
            state.slots.append([self.slots.pop(row) for row in accepted if row in self.slots])
        ahead_ns = 0
        if hit is not None and not hit.num_uncached and hit.timings is not None:
            state.slots.append(_bonus_slot(hit))
            state.tree, state.tree_slots = hit.tree, hit.tree_slots
            ahead_ns = hit.timings.calibrate_ns + hit.timings.fuzzy_ns
            del self.guesses[tuple(said)]
        state.timings = DraftTimings(ahead_ns=ahead_ns)
        state.num_exact = state.slots.num_cached
        self.drop()

    def drop(self) -> None:
        """Free what was taken; idempotent."""
        for guess in self.guesses.values():
            self.memory.free(_bonus_slot(guess))
            guess.drop_tree()
        self.memory.free([*self.slots.values()])
        self.guesses, self.slots = {}, {}


class AheadDrafting:
    """Runs what sessions draft ahead, a pass at a time, so that a verdict never waits for more than one.

    `num_guesses` verdicts are guessed. Slots are taken only while as many as a tree may need stay free beside them.
    """

    def __init__(self, drafting: ModelDrafting, num_guesses: int) -> None:
        self._drafting = drafting
        self._decoder = drafting.decoder
        self._memory = drafting.memory
        self._num_guesses = num_guesses

    def begin(self, state: ModelState, sent: ScoredTree, budget: TreeBudget) -> bool:
        """Begin behind a tree that has just been sent; False for sessions that this does not fit, which go without."""
        request = state.request
        is_plain = state.exits is None and request.calibration and request.preference is None
        is_plain = is_plain and self._decoder.config.pard_token is None
        if not is_plain or state.slots.num_cached != state.num_exact:
            return False
        rows = likeliest_rows(sent, _MOST_ROWS)
        deepest = max((sent.tree.row_depths[row] for row in rows), default=0)
        num_left = request.max_length - len(state.token_ids) - budget.num_levels - 1
        if deepest > num_left or not self._has_room(len(rows)):
            return False
        slots = dict(zip(rows, self._memory.allocate(len(rows)), strict=True))
        trunk = state.branch((), ())
        trunk.tree, trunk.tree_slots = LevelTree(budget, state.sharpness), slots
        for node, token_id in enumerate(sent.tree.token_ids):
            trunk.tree.add(sent.tree.parent_rows[node], token_id, sent.log_values[node])
        trunk.tree.frontier = rows
        state.ahead = Ahead(self._memory, sent, budget, slots, trunk)
        return True

    def step(self, states: Sequence[ModelState]) -> bool:
        """One pass; whether it computed anything."""
        with torch.inference_mode():
            going = [(state, state.ahead) for state in states if isinstance(state.ahead, Ahead)]
            for state, ahead in going:
                if not ahead.is_read:
                    candidates, rows = {0: state.growing.expanded[0]}, [*ahead.slots]
                    if rows:
                        (ranked,) = self._read([ahead.trunk], [ahead.trunk.node_segment(rows)])
                        candidates |= dict(zip(rows, ranked, strict=True))
                    ahead.guess(state, candidates, self._num_guesses)
                    return True
            guesses = [guess for _, ahead in going for guess in ahead.guesses.values()]
            unread = [guess for guess in guesses if guess.num_uncached]
            if unread and self._has_room(len(unread)):
                started_ns = time.monotonic_ns()
                first_levels = self._read(unread, [guess.take_chain(1) for guess in unread])
                for guess, first_level in zip(unread, first_levels, strict=True):
                    guess.growing.add_level(first_level)
                    guess.add_time(time.monotonic_ns() - started_ns, is_fuzzy=False)
                return True
            growing = [guess for guess in guesses if not guess.num_uncached and guess.growing.frontier]
            group: list[tuple[ModelState, Segment]] = []
            for guess in growing:
                if guess.request.plan == growing[0].request.plan and self._has_room(len(guess.growing.frontier)):
                    group.append((guess, guess.take_frontier()))
            if group:
                self._drafting.grow(group, growing[0].request.plan)
            return bool(group)

    def _read(self, states: Sequence[ModelState], segments: Sequence[Segment]) -> list[list[Candidates]]:
        """An exact pass over the frontiers of `states`; per state what may follow each of its rows."""
        layout = lay_out(segments)
        rows = range(sum(layout.num_rows))
        result = self._decoder.forward(layout, self._memory.pool, self._decoder.sequential_plan, rows)
        return rank_level(self._decoder.executor, states, result.named_logits, result.vocabulary)

    def _has_room(self, num_slots: int) -> bool:
        return num_slots + self._drafting.max_tree_slots <= self._memory.num_available


def _bonus_slot(guess: ModelState) -> list[int]:
    """The slot of the bonus token, once it has one: before the pass that reads it, which may fail."""
    slots = guess.slots
    return [] if guess.num_uncached else [int(slots.by_position[slots.num_cached - 1])]


def likeliest_rows(sent: ScoredTree, most_rows: int) -> list[int]:
    """The most valuable rows, parents first: a child is never worth more than its parent."""
    order = sorted(range(1, len(sent.tree) + 1), key=lambda row: (-sent.log_values[row - 1], row))
    return sorted(order[:most_rows])
