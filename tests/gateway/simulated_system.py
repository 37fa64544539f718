"""A drafter and a verifier that share a machine, as cost curves: no sockets, no clock but the simulated one."""

from __future__ import annotations

import functools
import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from easyspec.speculation.messages import Verdict, VerifyTimings
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from gateway.decode_loop import Round, TimedDraft, TimedVerdict
from gateway.speculation.controller import SpeculationController
from gateway.speculation.policy import FixedPolicy, SpeculationPolicy


@dataclass
class Costs:
    """Seconds. A verifier step of `rows` rows of all requests takes `verify(rows)`, a level of `num_drafting` trees
    `draft_level(num_drafting)`; a draft token at `level` is accepted with `acceptance`, a session that was left out
    takes `catch_up_s` to be usable again."""

    verify: Callable[[float], float] = lambda rows: 0.020 + 0.0001 * rows
    draft_level: Callable[[float], float] = lambda num_drafting: 0.001 + 0.0002 * num_drafting
    acceptance: float = 0.8
    catch_up_s: float = 0.2
    noise: float = 0.1


@dataclass
class _Request:
    policy: SpeculationPolicy | FixedPolicy
    acceptance: float | None
    draft: TimedDraft | None = None
    verify_s: float = 0.0
    ready_at_s: float | None = 0.0
    num_rounds: int = 0
    num_drafted: int = 0
    num_tokens: int = 0
    levels: set[int] = field(default_factory=set)
    is_gone: bool = False


class SimulatedSystem:
    """`costs` may be changed while it runs. `requests` decode for ever."""

    def __init__(self, costs: Costs, seed: int = 0) -> None:
        self.costs = costs
        self.now_s = 0.0
        self.requests: list[_Request] = []
        self._random = random.Random(seed)
        self._ends: list[tuple[float, int]] = []
        self._num_rows = 0
        self._num_drafting = 0

    def clock(self) -> float:
        return self.now_s

    def add(self, policy: SpeculationPolicy | FixedPolicy, acceptance: float | None = None) -> _Request:
        request = _Request(policy, acceptance)
        self.requests.append(request)
        self._begin(len(self.requests) - 1)
        return request

    def remove(self, request: _Request) -> None:
        """The request is over."""
        request.is_gone = True
        self._replace_draft(request, None)
        request.policy.leave()

    def run(self, seconds: float) -> float:
        """Tokens per second of all requests together in the next `seconds` seconds."""
        end_s = self.now_s + seconds
        before = sum(request.num_tokens for request in self.requests)
        while self._ends and self._ends[0][0] <= end_s:
            self.now_s, index = heapq.heappop(self._ends)
            if not self.requests[index].is_gone:
                self._end(self.requests[index])
                self._begin(index)
        self.now_s = end_s
        return (sum(request.num_tokens for request in self.requests) - before) / seconds

    def _begin(self, index: int) -> None:
        request = self.requests[index]
        budget = request.policy.next_budget() if request.num_rounds else None
        self._replace_draft(request, self._draft(request, budget))
        request.num_rounds += 1
        request.verify_s = self.costs.verify(self._num_rows) * self._jitter()
        heapq.heappush(self._ends, (self.now_s + request.draft.elapsed_ns / 1e9 + request.verify_s, index))

    def _replace_draft(self, request: _Request, draft: TimedDraft | None) -> None:
        for one, sign in ((request.draft, -1), (draft, 1)):
            if one is not None:
                self._num_rows += sign * (len(one.tree) + 1)
                self._num_drafting += sign * (len(one.tree) > 0)
        request.draft = draft

    def _draft(self, request: _Request, budget: TreeBudget | None) -> TimedDraft:
        if budget is None:
            request.ready_at_s = None
            return TimedDraft(EMPTY_TREE)
        if request.ready_at_s is None:
            request.ready_at_s = self.now_s + self.costs.catch_up_s
        if self.now_s < request.ready_at_s:
            return TimedDraft(EMPTY_TREE)
        tree = _tree(budget)
        num_levels = tree.num_levels
        request.num_drafted += 1
        request.levels.add(num_levels)
        elapsed_s = num_levels * self.costs.draft_level(self._num_drafting + 1) * self._jitter()
        return TimedDraft(tree, elapsed_ns=int(elapsed_s * 1e9))

    def _jitter(self) -> float:
        return self._random.uniform(1 - self.costs.noise, 1 + self.costs.noise)

    def _end(self, request: _Request) -> None:
        draft = request.draft
        assert draft is not None, "a round is under way"
        acceptance = self.costs.acceptance if request.acceptance is None else request.acceptance
        num_accepted = 0
        while num_accepted < draft.tree.num_levels and self._random.random() < acceptance:
            num_accepted += 1
        request.num_tokens += num_accepted + 1
        num_sessions = sum(not one.is_gone for one in self.requests)
        verdict = Verdict(0, tuple(range(num_accepted + 1)), tuple(range(1, num_accepted + 1)))
        answer = TimedVerdict(verdict, VerifyTimings(0, 0, self._num_rows, num_sessions), int(request.verify_s * 1e9))
        request.policy.learn(Round(draft, answer))


@functools.cache
def _tree(budget: TreeBudget) -> TokenTree:
    """A chain of the budget's levels; the other nodes are siblings, which cost rows and are never right."""
    num_levels = min(budget.num_levels, budget.num_nodes)
    return TokenTree(tuple(range(budget.num_nodes)), (*range(num_levels), *([0] * (budget.num_nodes - num_levels))))


def throughput_of(
    make_policy: Callable[[SpeculationController], SpeculationPolicy | FixedPolicy],
    num_requests: int,
    costs: Costs,
    budget: TreeBudget,
    seconds: float,
    warm_up_s: float = 0.0,
) -> tuple[float, SpeculationController]:
    """Tokens per second of so many equal requests after the warm-up, and the controller they had."""
    system = SimulatedSystem(costs)
    controller = SpeculationController(budget, system.clock)
    for _ in range(num_requests):
        system.add(make_policy(controller))
    if warm_up_s:
        system.run(warm_up_s)
    return system.run(seconds), controller


def fixed_throughputs(
    budgets: Sequence[TreeBudget | None], num_requests: int, costs: Costs, budget: TreeBudget
) -> list[float]:
    """Tokens per second with each fixed choice."""
    seconds = 60.0 if num_requests < 16 else 10.0
    return [
        throughput_of(lambda controller, b=choice: FixedPolicy(controller, b), num_requests, costs, budget, seconds)[0]
        for choice in budgets
    ]
