"""Drafting ahead: the next tree, begun while the last one is being verified.

A verdict is a path of the tree and then a token that the tree does not have there. So the likeliest rows of the tree
are read exactly, as a calibration would read them, which says what may come after each; the likeliest pairs of (path,
bonus token) are guesses at the verdict, each the root of a tree that grows beside the others', as rows of one pass.
If the verdict is among them, its tree is the session's, as far as it has grown; else
what was read of the accepted tokens is kept, and the session drafts as ever. As the noise of the verifier's choice is
known here, the bonus token can be guessed as well as any other. A wrong guess cannot change the output.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from drafter_service.model.ahead import Ahead, Guess, likeliest_rows
from drafter_service.model.drafting import ModelDrafting
from drafter_service.model.growth import LevelTree
from drafter_service.model.ranking import rank_level
from drafter_service.model.state import ModelState
from easyspec.model.row_layout import Segment, lay_out
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.token_tree import ScoredTree

# Rows of the tree that are read: verdicts that end elsewhere are not guessed. A pass of so many rows takes little more
# time than one of a few.
_MOST_ROWS = 8


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

    def take_up(self, state: ModelState, said: Sequence[int], budget: TreeBudget) -> None:
        """The verdict has come, and the session has begun its next tree: keep what came true."""
        ahead, state.ahead = state.ahead, None
        if not isinstance(ahead, Ahead):
            return
        if not ahead.take_up(state, said, budget) and state.drafting is not None:
            state.drafting.ahead_ns = 0

    def step(self, states: Sequence[ModelState]) -> bool:
        """One pass; whether it computed anything."""
        going = [(state, state.ahead) for state in states if isinstance(state.ahead, Ahead)]
        with torch.inference_mode():
            for state, ahead in going:
                if not ahead.is_read:
                    self._read_tree(state, ahead)
                    return True
            unread = [guess for _, ahead in going for guess in ahead.unread]
            if unread and self._has_room(len(unread)):
                self._read_bonus_tokens(unread)
                return True
            return self._grow([guess for _, ahead in going for guess in ahead.growing])

    def _read_tree(self, state: ModelState, ahead: Ahead) -> None:
        """An exact pass over the likeliest rows of the tree that was sent, which gives guesses at the verdict."""
        candidates = {0: state.growing.expanded[0]}
        rows = [*ahead.slots]
        if rows:
            layout = lay_out([ahead.trunk.node_segment(rows)])
            plan = self._decoder.sequential_plan
            result = self._decoder.forward(layout, self._memory.pool, plan, range(len(rows)))
            (ranked,) = rank_level(self._decoder.executor, [ahead.trunk], result.logits)
            candidates |= dict(zip(rows, ranked, strict=True))
        ahead.guess(state, candidates, self._num_guesses)

    def _read_bonus_tokens(self, guesses: Sequence[Guess]) -> None:
        """An exact pass over the bonus tokens, which gives the first levels."""
        started_ns = time.monotonic_ns()
        segments = [guess.state.chain_segment(guess.state.slots.extend(1)) for guess in guesses]
        layout = lay_out(segments)
        plan = self._decoder.sequential_plan
        logits = self._decoder.forward(layout, self._memory.pool, plan, range(len(guesses))).logits
        states = [guess.state for guess in guesses]
        for guess, candidates in zip(guesses, rank_level(self._decoder.executor, states, logits), strict=True):
            guess.state.growing.add_level(candidates)
            guess.is_read = True
            if guess.state.drafting is not None:
                guess.state.drafting.is_calibrated = True
                guess.state.drafting.calibrate_ns = time.monotonic_ns() - started_ns

    def _grow(self, guesses: Sequence[Guess]) -> bool:
        """A level for the trees of one plan."""
        plans = {guess.state.request.plan for guess in guesses}
        group: list[tuple[ModelState, Segment]] = []
        for state in (guess.state for guess in guesses):
            num_nodes = len(state.growing.frontier)
            if state.request.plan in [*plans][:1] and self._has_room(num_nodes):
                group.append((state, state.frontier_segment(self._memory.allocate(num_nodes))))
        if group:
            self._drafting.grow(group, group[0][0].request.plan)
        return bool(group)

    def _has_room(self, num_slots: int) -> bool:
        return num_slots + self._drafting.max_tree_slots <= self._memory.num_available
