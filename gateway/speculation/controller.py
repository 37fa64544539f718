"""How much to speculate: what earns most tokens per second of all requests together, at the present load.

Drafter and verifier may share the same cores, and requests share every step; so what a tree costs does not show in
the round of the request that asked for it. What counts is the throughput of the system while *all requests* follow the
same choice. The controller therefore makes one choice for all requests in mode auto (an arm: off, or a tree size),
measures throughput per load (running requests, by octave) and arm, keeps to the best, and tries each other arm now
and then for a moment. A trial is as rare as it is costly: all trials together may cost 1.5 % of the throughput. Times
count only while requests run: of a client that comes now and then an hour may be no more than a few requests.
Decision record 0007 has the reasons and the figures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from easyspec.speculation.parameters import TreeBudget
from gateway.speculation.arms import OFF, Arm, arms_within
from gateway.speculation.estimates import AcceptanceCurve, BusyClock, CostCurve, Throughput, VerifierLoad

# Trials may cost this share of the throughput.
_EXPLORATION_SHARE = 0.015
# A challenger must be better by this factor, and by more as long as few rounds are known of it: acceptance is noisy.
_MARGIN, _NOISE = 1.01, 0.15
# Rounds count while this share of the running requests does the same thing.
_UNIFORM_SHARE = 0.75
_MIN_ROUNDS = 16
_MIN_TRIAL_S = 0.3
# A trial ends here whether enough was measured or not.
_MAX_TRIAL_S = 3.0
# ... or as soon as this many rounds say that it is not even half as good.
_HOPELESS_ROUNDS = 4
_MIN_INTERVAL_S, _MAX_INTERVAL_S = 3.0, 120.0
# Cost to expect of a trial that was never made, per unit of expected loss.
_EXPECTED_TRIAL_S = 0.6
# What the next trial of an arm that has just become worse is taken to cost.
_QUICK_RETRY_COST_S = 0.05
# An arm that should bring less than this share is not tried at once when a load is new.
_PROMISING = 0.6
_DECISION_INTERVAL_S = 0.02
# The number of running requests must have changed for this long to count as another load.
_LOAD_PATIENCE_S = 0.3


@dataclass(frozen=True)
class RoundSample:
    """One round of one request: what it brought, what it took, and how (`arm` None: in some other way).

    `verify_s` and `draft_s` are as the gateway waited for them, queueing included; `other_s` is the rest of the round:
    the gateway's own work, and its turn among the other streams. Plain rounds are many, and pay it for every token.
    `num_batch_sessions` shared the verifier's step, those of other gateways included.
    """

    arm: Arm | None
    num_tokens: int
    num_accepted: int
    num_levels: int
    num_rows: int
    draft_s: float
    verify_s: float
    other_s: float = 0.0
    num_batch_sessions: int = 1

    @property
    def seconds(self) -> float:
        return self.draft_s + self.verify_s + self.other_s


@dataclass(frozen=True)
class ControllerState:
    """The controller in plain numbers, for metrics and information. Throughputs are those of the present load."""

    num_running: int
    load: int
    arms: tuple[str, ...]
    arm: str
    budget: TreeBudget | None
    is_trial: bool
    num_switches: int
    num_trials: int
    trial_cost_s: float
    tokens_per_s: Mapping[str, float]
    acceptance_by_level: tuple[float, ...]


@dataclass
class _Load:
    """What is known at one load: the best arm so far, throughput by arm, and when each was tried at what cost."""

    best: Arm
    since_s: float
    throughputs: dict[Arm, Throughput] = field(default_factory=dict)
    tried_s: dict[Arm, float] = field(default_factory=dict)
    trial_cost_s: dict[Arm, float] = field(default_factory=dict)

    def known(self, arm: Arm) -> Throughput | None:
        throughput = self.throughputs.get(arm)
        return throughput if throughput is not None and throughput.is_known else None


@dataclass
class _Trial:
    """A moment in which all requests follow another arm than the best."""

    arm: Arm
    started_s: float
    num_tokens: int = 0
    num_rounds: int = 0
    measured_tokens: int = 0
    measured_s: float = 0.0


class Participant:
    """A running request as the controller counts it; `following` is the arm of its last round, if it was one."""

    def __init__(self) -> None:
        self.following: Arm | None = None
        self.is_counted = False


class SpeculationController:
    """One for all requests of a gateway; lives in its event loop. `clock` is monotonic, in seconds."""

    def __init__(self, budget: TreeBudget, clock: Callable[[], float] = time.monotonic) -> None:
        self.arms: Sequence[Arm] = arms_within(budget)
        # The smallest trees: they cost least where guesses are poor, and a request whose guesses are good climbs.
        self.arm = self.arms[1]
        self.clock = clock
        self._busy_clock = BusyClock(clock)
        self._loads: dict[int, _Load] = {}
        self._load = 0
        self._load_seen_s = 0.0
        self._counts: dict[Arm | None, int] = {}
        self._num_counted = 0
        self._verifier_load = VerifierLoad()
        self._uniform: Arm | None = None
        self._uniform_since_s = 0.0
        self._trial: _Trial | None = None
        self._decided_s = 0.0
        self._verify = CostCurve()
        self._draft_level = CostCurve()
        self.acceptance = AcceptanceCurve()
        self._num_switches = 0
        self._num_trials = 0
        self._trial_cost_s = 0.0

    # --- what requests tell ---------------------------------------------------------------------------------------

    def observe(self, participant: Participant, sample: RoundSample) -> None:
        """Learn from a round that has just ended, and decide anew if it is time to."""
        now_s = self._busy_s()
        self._count(participant, sample.arm, now_s)
        self._verifier_load.add(sample.num_batch_sessions, now_s)
        if self._trial is not None:
            self._trial.num_tokens += sample.num_tokens
        if sample.num_levels:
            self.acceptance.add(sample.num_levels, sample.num_accepted)
        # A round that began before all requests did the same as now tells nothing about doing so.
        is_settled = self._uniform is not None and now_s - sample.seconds >= self._uniform_since_s
        if is_settled and sample.arm is self._uniform and sample.seconds > 0:
            self._learn(sample)
        if now_s - self._decided_s >= _DECISION_INTERVAL_S:
            self._decided_s = now_s
            self._decide(now_s)

    def leave(self, participant: Participant) -> None:
        if participant.is_counted:
            now_s = self._busy_s()
            self._counts[participant.following] -= 1
            self._num_counted -= 1
            participant.is_counted = False
            self._find_uniform(now_s)

    def break_even_acceptance(self) -> float | None:
        """Accepted tokens per round below which the present tree brings a request less than plain decoding; None while
        that is not known, in a trial, and while the present choice is off."""
        load = self._loads.get(self._load)
        if load is None or self.arm is OFF or self._trial is not None:
            return None
        drafted, plain = load.known(self.arm), load.known(OFF)
        if drafted is None or plain is None:
            return None
        return drafted.tokens_per_round * plain.tokens_per_s / drafted.tokens_per_s - 1

    def state(self) -> ControllerState:
        load = self._loads.get(self._load)
        known = load.throughputs if load is not None else {}
        return ControllerState(
            num_running=self._num_counted,
            load=2**self._load,
            arms=tuple(arm.name for arm in self.arms),
            arm=self.arm.name,
            budget=self.arm.budget,
            is_trial=self._trial is not None,
            num_switches=self._num_switches,
            num_trials=self._num_trials,
            trial_cost_s=self._trial_cost_s,
            tokens_per_s={arm.name: known[arm].tokens_per_s for arm in self.arms if arm in known},
            acceptance_by_level=self.acceptance.rates,
        )

    @property
    def _num_running(self) -> int:
        """Requests that share the verifier, as far as they are known: its steps hold other gateways' as well."""
        return max(self._num_counted, self._verifier_load.num_sessions)

    def _busy_s(self) -> float:
        return self._busy_clock.read(was_busy=self._num_counted > 0)

    def _count(self, participant: Participant, arm: Arm | None, now_s: float) -> None:
        if participant.is_counted and participant.following is arm:
            return
        if participant.is_counted:
            self._counts[participant.following] -= 1
        else:
            participant.is_counted = True
            self._num_counted += 1
        participant.following = arm
        self._counts[arm] = self._counts.get(arm, 0) + 1
        self._find_uniform(now_s)

    def _find_uniform(self, now_s: float) -> None:
        """Who does the same thing as most; measuring starts over when that changes."""
        top = max(self._counts, key=lambda arm: self._counts[arm], default=None)
        uniform = top if self._counts.get(top, 0) >= _UNIFORM_SHARE * max(self._num_counted, 1) else None
        if uniform is not self._uniform:
            self._uniform, self._uniform_since_s = uniform, now_s

    def _learn(self, sample: RoundSample) -> None:
        num_running = self._num_running
        self._verify.add(num_running * sample.num_rows, sample.verify_s)
        if sample.num_levels:
            self._draft_level.add(num_running, sample.draft_s / sample.num_levels)
        load = self._loads.get(self._load)
        if load is None or sample.arm is None or _octave(num_running) != self._load:
            return
        busy_s = sample.seconds / num_running
        change = load.throughputs.setdefault(sample.arm, Throughput()).add(sample.num_tokens, busy_s)
        if change is not None:
            self._spread_change(load, sample.arm, change)
        if self._trial is not None and sample.arm is self._trial.arm:
            self._trial.num_rounds += 1
            self._trial.measured_tokens += sample.num_tokens
            self._trial.measured_s += busy_s

    def _spread_change(self, load: _Load, arm: Arm, change: float) -> None:
        """An arm has become worse or better at once: what made it so concerns the other trees as well."""
        if arm is OFF:
            return
        now_s = self._busy_s()
        for other in (other for other in self.arms if other not in (arm, OFF)):
            if change > 1:
                load.trial_cost_s[other] = 0.0
            elif (known := load.known(other)) is not None:
                known.scale(change)
                load.tried_s[other], load.trial_cost_s[other] = now_s, _EXPECTED_TRIAL_S
        if change < 1:  # it may pass: look again soon, once, with the arm that was best
            load.tried_s[arm], load.trial_cost_s[arm] = now_s, _QUICK_RETRY_COST_S

    # --- what follows from it -------------------------------------------------------------------------------------

    def _decide(self, now_s: float) -> None:
        load = self._enter_load(now_s)
        if self._trial is not None:
            self._continue_trial(load, self._trial, now_s)
            return
        best = load.known(load.best)
        if best is None or not best.is_fresh:
            return  # nothing to compare with yet
        rates = {arm: _surely(known) for arm in self.arms if (known := load.known(arm)) is not None}
        rates[load.best] = _MARGIN * best.tokens_per_s
        challenger = max(rates, key=lambda arm: rates[arm])
        if challenger is not load.best:
            load.best = challenger
            load.tried_s[challenger] = now_s
            self._follow(load, challenger)
            return
        due = [arm for arm in self.arms if arm is not load.best and self._is_due(load, arm, now_s)]
        if due:
            arm = max(due, key=lambda arm: self._expected_ratio(load, arm))
            self._trial = _Trial(arm, now_s)
            self._num_trials += 1
            self._follow(load, arm)

    def _enter_load(self, now_s: float) -> _Load:
        """The load of the present number of running requests; a trial does not outlive a change of it."""
        number = _octave(self._num_running)
        if number == self._load:
            self._load_seen_s = now_s
        elif now_s - self._load_seen_s >= _LOAD_PATIENCE_S:
            if self._trial is not None:  # as if it had cost what it was expected to, lest it begin again and again
                self._loads[self._load].tried_s[self._trial.arm] = now_s
                self._trial = None
            nearest = min(self._loads, key=lambda other: abs(other - number), default=None)
            best = self._loads[nearest].best if nearest is not None else self.arm
            self._load, self._load_seen_s = number, now_s
            load = self._loads.setdefault(number, _Load(best, now_s))
            self._follow(load, load.best)
        return self._loads.setdefault(self._load, _Load(self.arm, now_s))

    def _follow(self, load: _Load, arm: Arm) -> None:
        if arm is not self.arm:
            self.arm = arm
            self._num_switches += 1
            if (known := load.known(arm)) is not None:
                known.take_up_again()

    def _continue_trial(self, load: _Load, trial: _Trial, now_s: float) -> None:
        best = load.known(load.best)
        assert best is not None, "a trial is compared with something"
        elapsed_s = now_s - trial.started_s
        needed_rounds = max(_MIN_ROUNDS, self._num_counted)
        is_measured = trial.num_rounds >= needed_rounds and trial.measured_s >= _MIN_TRIAL_S
        is_hopeless = (
            trial.num_rounds >= _HOPELESS_ROUNDS
            and trial.measured_s >= _MIN_TRIAL_S
            and trial.measured_tokens < 0.5 * best.tokens_per_s * trial.measured_s
        )
        if not (is_measured or is_hopeless or elapsed_s >= _MAX_TRIAL_S):
            return
        cost_s = max(0.0, elapsed_s - trial.num_tokens / best.tokens_per_s)
        self._trial_cost_s += cost_s
        load.tried_s[trial.arm] = now_s
        load.trial_cost_s[trial.arm] = cost_s
        self._trial = None
        known = load.known(trial.arm)
        if known is not None:
            change = known.end_stretch()
            if change is not None:
                self._spread_change(load, trial.arm, change)
            if is_measured and _surely(known) > _MARGIN * best.tokens_per_s:
                load.best = trial.arm
        self._follow(load, load.best)

    def _is_due(self, load: _Load, arm: Arm, now_s: float) -> bool:
        """Whether a trial of `arm` is worth its cost by now."""
        if arm not in load.tried_s:
            ratio = self._expected_ratio(load, arm)
            if ratio >= _PROMISING and load.known(arm) is None:
                return True
            last_s, cost_s = load.since_s, _EXPECTED_TRIAL_S * max(0.0, 1.0 - ratio)
        else:
            last_s, cost_s = load.tried_s[arm], load.trial_cost_s.get(arm, 0.0)
        interval_s = cost_s * (len(self.arms) - 1) / _EXPLORATION_SHARE
        return now_s - last_s >= min(max(interval_s, _MIN_INTERVAL_S), _MAX_INTERVAL_S)

    def _expected_ratio(self, load: _Load, arm: Arm) -> float:
        """Throughput of `arm` over that of the best: as measured at this load, else at the next lower or higher one,
        else by the cost curves; 1 if nothing is known."""
        nearby = (load, self._loads.get(self._load - 1), self._loads.get(self._load + 1))
        for other in (other for other in nearby if other is not None):
            measured, reference = other.known(arm), other.known(load.best)
            if measured is not None and reference is not None:
                return measured.tokens_per_s / reference.tokens_per_s
        predicted, reference_s = self._predicted(arm), self._predicted(load.best)
        return predicted / reference_s if predicted is not None and reference_s else 1.0

    def _predicted(self, arm: Arm) -> float | None:
        """Tokens per second of one request by the cost curves and acceptance; None before enough is known."""
        num_running = max(1, self._num_running)
        verify_s = self._verify.predict(num_running * arm.num_rows)
        level_s = self._draft_level.predict(num_running) if arm.num_levels else 0.0
        if verify_s is None or level_s is None:
            return None
        return (1 + self.acceptance.expected(arm.num_levels)) / (verify_s + arm.num_levels * level_s)


def _surely(throughput: Throughput) -> float:
    """Tokens per second, less what may be luck."""
    return throughput.tokens_per_s / (1 + _NOISE / math.sqrt(max(throughput.num_rounds, 1.0)))


def _octave(num_running: int) -> int:
    """1, 2, 3-4, 5-8, 9-16, ... requests as 0, 1, 2, 3, 4, ..."""
    return max(0, num_running - 1).bit_length()
