"""The controller against simulated systems with known costs: what auto earns of the best fixed choice."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from easyspec.speculation.messages import Verdict, VerifyTimings
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.token_tree import TokenTree
from gateway.decode_loop import NOTHING_DRAFTED, Round, TimedDraft, TimedVerdict
from gateway.speculation.arms import OFF, Arm, arms_within, deepened, within
from gateway.speculation.controller import SpeculationController
from gateway.speculation.estimates import AcceptanceCurve, CostCurve, Throughput, VerifierLoad
from gateway.speculation.policy import FixedPolicy, SpeculationPolicy
from tests.gateway.simulated_system import Costs, SimulatedSystem, fixed_throughputs, throughput_of

BUDGET = TreeBudget(num_levels=5, width=4, num_nodes=15)
MIN_SHARE = 0.97


def cheap_rows() -> Costs:
    """A base model whose step costs nearly the same for 1 row and 100, as on a GPU far from saturation."""
    return Costs(verify=lambda rows: 0.020 + 0.00005 * rows, draft_level=lambda drafting: 0.001 + 0.00005 * drafting)


def shared_cores() -> Costs:
    """Rows cost from the first one on, and drafting takes the same cores."""
    return Costs(verify=lambda rows: 0.020 + 0.0003 * rows, draft_level=lambda drafting: 0.002 + 0.0008 * drafting)


def cliff() -> Costs:
    """Beyond 200 rows a row costs twice as much: always-on falls off at 16 streams."""
    return Costs(
        verify=lambda rows: 0.020 + (0.0002 if rows < 200 else 0.0004) * rows,
        draft_level=lambda drafting: 0.002 + 0.0008 * drafting,
    )


def useless_drafts() -> Costs:
    return Costs(acceptance=0.1)


def auto(controller: SpeculationController) -> SpeculationPolicy:
    return SpeculationPolicy(controller, None)


@pytest.mark.parametrize(
    ("costs", "num_requests"),
    [
        *((cliff, num_requests) for num_requests in (1, 2, 4, 8, 16, 32, 64)),
        *((cheap_rows, num_requests) for num_requests in (1, 16)),
        *((shared_cores, num_requests) for num_requests in (1, 8, 32)),
        *((useless_drafts, num_requests) for num_requests in (1, 16)),
    ],
)
def test_auto_earns_what_the_better_of_on_and_off_does_at_every_concurrency(
    costs: Callable[[], Costs], num_requests: int
) -> None:
    best = max(fixed_throughputs([None, BUDGET], num_requests, costs(), BUDGET))
    seconds = max(25.0, 240.0 / num_requests)  # a few thousand rounds, and long enough for trials that are rare
    earned, _ = throughput_of(auto, num_requests, costs(), BUDGET, seconds, warm_up_s=10.0)
    assert earned >= MIN_SHARE * best


@pytest.mark.parametrize("num_requests", [1, 8])
def test_trials_cost_about_two_per_cent(num_requests: int) -> None:
    seconds = 120.0
    _, controller = throughput_of(auto, num_requests, cliff(), BUDGET, seconds)
    state = controller.state()
    assert state.num_trials >= 3
    assert state.trial_cost_s <= 0.03 * seconds + 1.0  # the first look at every arm is not spread over time


def busy_seconds_of_visits(policy_of: Callable[[SpeculationController], SpeculationPolicy | FixedPolicy]) -> float:
    """What the last 60 of 80 short requests take, of a client that comes every quarter of a minute."""
    system = SimulatedSystem(cheap_rows(), seed=5)
    controller = SpeculationController(BUDGET, system.clock)
    busy_s = 0.0
    for visit in range(80):
        request, began_s = system.add(policy_of(controller)), system.now_s
        while request.num_tokens < 80:
            system.run(0.01)
        busy_s += system.now_s - began_s if visit >= 20 else 0.0
        system.remove(request)
        system.run(15.0)
    return busy_s


def test_trials_are_rare_for_somebody_who_comes_now_and_then() -> None:
    drafted = busy_seconds_of_visits(lambda controller: FixedPolicy(controller, BUDGET))
    assert busy_seconds_of_visits(auto) <= 1.04 * drafted


def test_intermediate_trees_are_found_where_they_are_best() -> None:
    """At 8 streams of the shared system neither off nor the full tree is best."""
    off, *_, full = fixed_throughputs([arm.budget for arm in arms_within(BUDGET)], 8, shared_cores(), BUDGET)
    earned, _ = throughput_of(auto, 8, shared_cores(), BUDGET, seconds=60.0, warm_up_s=10.0)
    assert earned >= 1.05 * max(off, full)


class Running:
    """Some requests in auto, whose system changes while they run."""

    def __init__(self, num_requests: int, costs: Costs, seed: int = 0) -> None:
        self.costs = costs
        self.system = SimulatedSystem(costs, seed)
        self.controller = SpeculationController(BUDGET, self.system.clock)
        self.num_requests = num_requests
        for _ in range(num_requests):
            self.system.add(auto(self.controller))

    def choice(self) -> Arm:
        """What it keeps to, a trial that may be under way aside."""
        while self.controller.state().is_trial:
            self.system.run(0.1)
        return self.controller.arm

    def share_of_best(self, seconds: float) -> float:
        """What the next seconds earn of what the better of on and off would."""
        best = max(fixed_throughputs([None, BUDGET], self.num_requests, self.costs, BUDGET))
        return self.system.run(seconds) / best


@pytest.mark.parametrize("num_requests", [1, 8])
def test_a_drafter_that_becomes_slow_is_left_alone_in_seconds_and_taken_up_again(num_requests: int) -> None:
    running = Running(num_requests, Costs())
    running.system.run(20.0)
    assert running.choice() is not OFF
    running.costs.draft_level = lambda drafting: 0.2
    running.system.run(20.0)
    assert running.share_of_best(60.0) >= MIN_SHARE - 0.03  # a trial takes 3 s, in a minute there may be one
    running.costs.draft_level = Costs().draft_level
    running.system.run(150.0)  # a trial of what cost seconds to try is due after two minutes at most
    assert running.share_of_best(30.0) >= MIN_SHARE - 0.03
    assert running.choice() is not OFF


def test_acceptance_that_drops_turns_drafting_off() -> None:
    running = Running(4, Costs())
    running.system.run(20.0)
    running.costs.acceptance = 0.02
    running.system.run(5.0)
    assert running.share_of_best(30.0) >= MIN_SHARE
    running.costs.acceptance = 0.8
    running.system.run(30.0)
    assert running.share_of_best(30.0) >= MIN_SHARE


def test_load_that_rises_and_falls_needs_no_new_search() -> None:
    running = Running(2, cliff())
    running.system.run(15.0)
    assert running.choice() is not OFF
    crowd = [running.system.add(auto(running.controller)) for _ in range(62)]
    running.system.run(20.0)
    assert running.choice() is OFF
    for request in crowd:
        running.system.remove(request)
    running.system.run(5.0)
    assert running.choice() is not OFF


@pytest.mark.parametrize("mode", ["on", "off"])
def test_requests_that_insist_are_counted_and_left_alone(mode: str) -> None:
    system = SimulatedSystem(cliff())
    controller = SpeculationController(BUDGET, system.clock)
    budget = BUDGET if mode == "on" else None
    for _ in range(8):
        system.add(FixedPolicy(controller, budget))
    system.run(5.0)
    trees = [len(request.draft.tree) for request in system.requests if request.draft is not None]
    assert trees == [15 if mode == "on" else 0] * 8
    state = controller.state()
    assert (state.num_running, state.load) == (8, 8)
    assert list(state.tokens_per_s) == ["full" if mode == "on" else "off"]  # what they show is learned from


def test_a_hopeless_request_among_good_ones_stops_drafting_and_is_tried_again() -> None:
    system = SimulatedSystem(cheap_rows())
    controller = SpeculationController(BUDGET, system.clock)
    for _ in range(6):
        system.add(auto(controller))
    hopeless = system.add(auto(controller), acceptance=0.0)
    system.run(20.0)
    drafted, rounds = hopeless.num_drafted, hopeless.num_rounds
    system.run(30.0)
    share = (hopeless.num_drafted - drafted) / (hopeless.num_rounds - rounds)
    assert 0.0 < share < 0.2
    assert system.requests[0].num_drafted / system.requests[0].num_rounds > 0.8


def test_a_request_whose_guesses_all_come_true_gets_deeper_trees() -> None:
    system = SimulatedSystem(cheap_rows())
    controller = SpeculationController(BUDGET, system.clock)
    eager = system.add(auto(controller), acceptance=1.0)
    system.run(30.0)
    assert max(eager.levels) == 10
    capped = SpeculationPolicy(controller, TreeBudget(3, 2, 4))
    first = system.add(capped, acceptance=1.0)
    system.run(10.0)
    assert max(first.levels) == 3


def test_a_request_that_leaves_is_no_load_any_more() -> None:
    running = Running(3, Costs())
    running.system.run(2.0)
    assert running.controller.state().num_running == 3
    for request in list(running.system.requests):
        request.policy.leave()
        request.policy.leave()  # harmless
    assert running.controller.state().num_running == 0


def drafted_round(num_levels: int, num_accepted: int) -> Round:
    tree = TokenTree(tuple(range(num_levels)), tuple(range(num_levels)))
    verdict = Verdict(1, (1,) * (num_accepted + 1), tuple(range(1, num_accepted + 1)))
    return Round(TimedDraft(tree, elapsed_ns=1), TimedVerdict(verdict, VerifyTimings(0, 0, 1, 1), 1))


def test_a_request_whose_guesses_are_all_right_gets_larger_trees_step_by_step() -> None:
    controller = SpeculationController(BUDGET, lambda: 0.0)
    controller.arm = controller.arms[1]
    policy = SpeculationPolicy(controller, None)
    policy.learn(drafted_round(0, 0))  # the prompt
    sizes = [arm.budget for arm in controller.arms if arm.budget is not None]
    for size in [*sizes, deepened(BUDGET)]:
        assert controller.arm is controller.arms[1]
        for _ in range(3):
            assert policy.next_budget() == size
            policy.learn(drafted_round(size.num_levels, size.num_levels))
    assert policy.next_budget() == deepened(BUDGET), "there is nothing above"
    policy.learn(drafted_round(5, 1))
    assert policy.next_budget() == sizes[-1]


def test_empty_trees_are_asked_for_less_and_less_until_there_is_one_again() -> None:
    policy = SpeculationPolicy(SpeculationController(BUDGET, lambda: 0.0), None)
    policy.learn(drafted_round(0, 0))  # the prompt

    def num_plain_rounds() -> int:
        """Until the next tree is asked for."""
        num_rounds = 0
        while policy.next_budget() is None:
            policy.learn(Round(NOTHING_DRAFTED, drafted_round(0, 0).answer))
            num_rounds += 1
        return num_rounds

    assert num_plain_rounds() == 0
    for expected in (1, 2, 4, 8, 8):
        policy.learn(drafted_round(0, 0))
        assert num_plain_rounds() == expected
    policy.learn(drafted_round(3, 0))
    assert num_plain_rounds() == 0
    policy.learn(drafted_round(0, 0))
    assert num_plain_rounds() == 1


def test_requests_of_another_gateway_are_load_as_well() -> None:
    """What this gateway's only request does follows from all that the verifier serves, and from nothing older."""
    crowd = 15
    best = max(fixed_throughputs([None, BUDGET], crowd + 1, cliff(), BUDGET))
    running = Running(1, cliff())
    running.system.run(20.0)
    alone = running.choice()
    assert alone is not OFF
    other = SpeculationController(BUDGET, running.system.clock)
    others = [running.system.add(auto(other)) for _ in range(crowd)]
    running.system.run(20.0)
    assert running.controller.state().num_running == 1
    assert running.controller.state().load == other.state().load == 16
    assert running.system.run(20.0) >= MIN_SHARE * best
    for request in others:
        running.system.remove(request)
    running.system.run(5.0)
    assert (running.controller.state().load, running.choice()) == (1, alone)


def test_the_load_that_verdicts_tell_does_not_flicker() -> None:
    load = VerifierLoad()
    told = []
    for step in range(200):
        load.add(7 + step % 3, step * 0.02)
        told.append(load.num_sessions)
    assert len(set(told[100:])) == 1
    load.add(1, 60.0)
    assert load.num_sessions == 1


# --- the parts --------------------------------------------------------------------------------------------------


def test_arms_grow_from_off_to_the_budget() -> None:
    arms = arms_within(BUDGET)
    assert [arm.name for arm in arms] == ["off", "small", "medium", "full"]
    assert [arm.num_rows for arm in arms] == [1, 4, 8, 16]
    assert arms[-1].budget == BUDGET
    levels = [arm.num_levels for arm in arms]
    assert levels == sorted(levels)


@pytest.mark.parametrize("budget", [TreeBudget(1, 1, 1), TreeBudget(2, 1, 2), TreeBudget(64, 64, 4096)])
def test_arms_of_any_budget_are_distinct_and_valid(budget: TreeBudget) -> None:
    arms = arms_within(budget)
    assert len({arm.budget for arm in arms}) == len(arms) >= 2
    for arm in arms[1:]:
        assert arm.budget is not None
        arm.budget.check(budget.num_nodes)
        assert within(arm.budget, budget) == arm.budget
        deepened(arm.budget).check(budget.num_nodes)


def test_throughput_is_tokens_by_wall_clock_and_notices_a_change() -> None:
    throughput = Throughput()
    assert not throughput.is_known
    changes = [throughput.add(3, 0.05) for _ in range(100)]
    assert not any(changes)
    assert throughput.tokens_per_s == pytest.approx(60.0)
    assert throughput.tokens_per_round == pytest.approx(3.0)
    changes = [throughput.add(3, 0.5) for _ in range(8)]
    assert [change for change in changes if change is not None][-1] < 0.5
    assert throughput.tokens_per_s == pytest.approx(6.0, rel=0.5)


def test_a_cost_curve_is_linear_between_what_it_knows() -> None:
    curve = CostCurve()
    assert curve.predict(4) is None
    for _ in range(200):
        curve.add(4, 0.010)
        curve.add(64, 0.040)
    assert curve.predict(34) == pytest.approx(0.025)
    assert curve.predict(2) == pytest.approx(0.005)
    assert curve.predict(128) == pytest.approx(0.080)


def test_acceptance_goes_on_beyond_the_levels_that_were_seen() -> None:
    curve = AcceptanceCurve()
    for index in range(400):
        curve.add(2, 2 if index % 4 == 0 else 1)
    assert curve.rates[0] == pytest.approx(1.0)
    assert curve.rates[1] == pytest.approx(0.25, abs=0.15)
    assert curve.expected(1) == pytest.approx(1.0)
    assert curve.expected(2) < curve.expected(4) < 2.0
