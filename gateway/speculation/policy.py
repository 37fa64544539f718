"""How much one request speculates, round by round."""

from __future__ import annotations

from abc import ABC, abstractmethod

from easyspec.speculation.parameters import TreeBudget
from gateway.decode_loop import Round
from gateway.speculation.arms import OFF, Arm, deepened, within
from gateway.speculation.controller import Participant, RoundSample, SpeculationController

_RATE = 0.2
# Drafted rounds before a request's own acceptance counts against it.
_MIN_DRAFTED_ROUNDS = 8
# Below this share of the break-even acceptance a request is better off without drafts.
_HOPELESS_SHARE = 0.6
_FIRST_REST_ROUNDS, _MAX_REST_ROUNDS = 64, 1024
# Rounds that a request drafts for after a rest before it is judged again.
_RETRY_ROUNDS = 2
# So many rounds in a row whose levels are all accepted get a request the next larger trees; one that accepts less than
# this share of its levels takes them away again.
_PERFECT_ROUNDS = 3
_POOR_SHARE = 0.5
# Behind an empty tree come plain rounds: one, then twice as many each time, up to this many. Where text repeats, it
# does so for longer.
_MAX_ROUNDS_AFTER_EMPTY = 8
# Plain rounds are asked for ahead, up to so many and as many as fit so long a time, after which the policy may change.
_MAX_PLAIN_ROUNDS, _PLAIN_ROUNDS_S = 16, 0.1
# Of what a round takes besides draft and verdict, this much and as long as these counts.
_MOST_OTHER_S = 0.02


class Policy(ABC):
    """How much one request speculates; see `gateway.decode_loop.BudgetPolicy`. It counts as load from its second round
    until it leaves."""

    def __init__(self, controller: SpeculationController) -> None:
        self._controller = controller
        self._participant = Participant()
        self._ended_s: float | None = None  # the last round
        self._plain_s: float | None = None  # what a plain round takes

    @property
    @abstractmethod
    def wants_drafts(self) -> bool:
        """Whether the next round would be drafted; decides if a session at the drafter is opened at once."""

    @abstractmethod
    def next_budget(self) -> TreeBudget | None: ...

    @abstractmethod
    def sampled_arm(self, round_: Round) -> Arm | None:
        """Learn from a round, and tell the arm whose sample it is; None: of no arm's."""

    def plain_rounds(self) -> int:
        """0 until it is known what a plain round takes."""
        if self._plain_s is None:
            return 0
        return min(_MAX_PLAIN_ROUNDS, int(_PLAIN_ROUNDS_S / self._plain_s))

    def learn(self, round_: Round) -> None:
        draft, answer = round_.draft, round_.answer
        now_s = self._controller.clock()
        last_s, self._ended_s = self._ended_s, now_s
        if last_s is None:  # the first: it took as long as the prompt
            return
        if not draft.tree:
            elapsed_s = max(now_s - last_s, 1e-6)
            self._plain_s = elapsed_s if self._plain_s is None else self._plain_s + _RATE * (elapsed_s - self._plain_s)
        # What it took besides draft and verdict. A client that reads slowly adds to it, hence the bound.
        asked_s = (draft.elapsed_ns + answer.elapsed_ns) / 1e9
        other_s = min(max(0.0, now_s - last_s - asked_s), asked_s + _MOST_OTHER_S)
        sample = RoundSample(
            arm=self.sampled_arm(round_),
            num_tokens=len(answer.verdict.token_ids),
            num_accepted=answer.verdict.num_accepted,
            num_levels=draft.tree.num_levels,
            num_rows=len(draft.tree) + 1,
            draft_s=draft.elapsed_ns / 1e9,
            verify_s=answer.elapsed_ns / 1e9,
            other_s=other_s,
            num_batch_sessions=answer.timings.num_batch_sessions,
        )
        self._controller.observe(self._participant, sample)

    def leave(self) -> None:
        """The request is over."""
        self._controller.leave(self._participant)


class SpeculationPolicy(Policy):
    """Mode auto: chooses the next tree of a request and learns from every round.

    The whole process's choice is refined by the request's own acceptance: one whose guesses are hopeless stops
    drafting and tries again now and then; one whose guesses are all accepted gets larger trees, step by step.
    `budget` None follows the gateway's arms up to their own size.
    """

    def __init__(self, controller: SpeculationController, budget: TreeBudget | None) -> None:
        super().__init__(controller)
        self._cap = budget
        self._arm: Arm | None = None
        self._asked: TreeBudget | None = None
        self._accepted = 0.0
        self._num_perfect = 0
        self._num_steps = 0  # up from the process's choice
        self._num_drafted = 0
        self._num_empty = 0  # trees in a row
        self._rest_left = 0
        self._rest_rounds = _FIRST_REST_ROUNDS

    @property
    def wants_drafts(self) -> bool:
        return self._controller.arm is not OFF

    def next_budget(self) -> TreeBudget | None:
        self._arm = self._controller.arm
        self._asked = self._refined(self._arm)
        return self._asked

    def plain_rounds(self) -> int:
        num_rounds = super().plain_rounds()
        if self._rest_left > 0:
            num_rounds = min(num_rounds, self._rest_left)
            self._rest_left -= num_rounds
        return num_rounds

    def _refined(self, arm: Arm) -> TreeBudget | None:
        if arm.budget is None:
            return None
        if self._rest_left > 0:
            self._rest_left -= 1
            return None
        break_even = self._controller.break_even_acceptance() if self._num_drafted >= _MIN_DRAFTED_ROUNDS else None
        if break_even is not None and self._accepted < _HOPELESS_SHARE * break_even:
            self._rest_left, self._rest_rounds = self._rest_rounds, min(2 * self._rest_rounds, _MAX_REST_ROUNDS)
            self._num_drafted = _MIN_DRAFTED_ROUNDS - _RETRY_ROUNDS
            return None
        # The size that this request has earned from `arm` on.
        arms = self._controller.arms
        sizes = [larger.budget for larger in arms[arms.index(arm) :] if larger.budget is not None]
        self._num_steps = min(self._num_steps, len(sizes))
        return within([*sizes, deepened(sizes[-1])][self._num_steps], self._cap)

    def sampled_arm(self, round_: Round) -> Arm | None:
        """A refined round is part of following the arm; one whose session at the drafter was not ready yet is not, nor
        is one that the request's own cap made smaller."""
        if self._asked is not None and len(round_.draft.tree) > 0:
            self._num_empty = 0
            self._learn_acceptance(round_.answer.verdict.num_accepted, round_.draft.tree.num_levels)
        elif self._asked is not None and round_.draft.elapsed_ns > 0:
            self._rest_left = min(2**self._num_empty, _MAX_ROUNDS_AFTER_EMPTY)
            self._num_empty += 1
        arm = self._arm
        if arm is None or (self._asked is not None and round_.draft.elapsed_ns == 0):
            return None
        is_capped = arm.budget is not None and within(arm.budget, self._cap) != arm.budget
        return None if is_capped else arm

    def _learn_acceptance(self, accepted: int, levels: int) -> None:
        rate = max(_RATE, 1 / (self._num_drafted + 1))
        self._num_drafted += 1
        self._accepted += rate * (accepted - self._accepted)
        self._num_perfect = self._num_perfect + 1 if accepted == levels else 0
        if self._num_perfect == _PERFECT_ROUNDS:
            self._num_perfect = 0
            self._num_steps += 1
        elif accepted < _POOR_SHARE * levels:
            self._num_steps = max(0, self._num_steps - 1)


class FixedPolicy(Policy):
    """Mode on (`budget`) or off (None): always the same, whatever it earns."""

    def __init__(self, controller: SpeculationController, budget: TreeBudget | None) -> None:
        super().__init__(controller)
        self._budget = budget
        self._arm = next((arm for arm in controller.arms if arm.budget == budget), None)

    @property
    def wants_drafts(self) -> bool:
        return self._budget is not None

    def next_budget(self) -> TreeBudget | None:
        return self._budget

    def sampled_arm(self, round_: Round) -> Arm | None:
        return self._arm if self._budget is None or round_.draft.elapsed_ns > 0 else None
