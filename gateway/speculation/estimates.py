"""What is known of the running system: throughput by load and tree size, cost curves, acceptance by level, load."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

# Older samples count for less: by this much busy time they have lost two thirds of their weight.
_MEMORY_S = 40.0
# When an estimate is taken up again, what it remembers weighs no more than this much busy time.
_STALE_WEIGHT_S = 15.0
# A stretch of this many rounds and seconds is compared with the memory, and replaces it if they differ by the factor:
# the system has changed. Few rounds say less, and must say it louder.
_STRETCH_ROUNDS, _STRETCH_S, _CHANGE_FACTOR = 16, 0.5, 1.3
# Texts differ in how well they are guessed: what differs by less than this must do so for that long.
_CLEAR_FACTOR, _CONFIRMED_S = 1.8, 2.5
_SHORT_STRETCH_ROUNDS, _SHORT_STRETCH_S, _SHORT_CHANGE_FACTOR = 2, 2.0, 2.5
_RATE = 0.05
# Of a step's sessions the newest weigh most: the estimate has made two thirds of its way after this many seconds.
_LOAD_MEMORY_S = 0.5
# The average must be as far from the number that is told for another one to be told: steps differ.
_LOAD_TOLERANCE = 0.6


@dataclass
class Throughput:
    """Output tokens per second of all requests together, learned round by round.

    A round of `seconds` seconds among n running requests stands for seconds / n of the system's time, in which it
    brought its tokens; so the sum over all requests' rounds is tokens per second of wall-clock time, whatever part of
    a round was waiting for the others. `is_fresh` once a stretch of rounds was measured since it was last taken up.
    """

    num_tokens: float = 0.0
    busy_s: float = 0.0
    num_rounds: float = 0.0
    is_fresh: bool = False
    _stretch: tuple[int, float, int] = (0, 0.0, 0)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.busy_s if self.busy_s > 0 else 0.0

    @property
    def tokens_per_round(self) -> float:
        return self.num_tokens / self.num_rounds if self.num_rounds > 0 else 1.0

    @property
    def is_known(self) -> bool:
        return self.num_rounds > 0

    def add(self, num_tokens: int, busy_s: float) -> float | None:
        """Learn from one round; returns by which factor the system has changed if it has, and forgets what was."""
        keep = math.exp(-busy_s / _MEMORY_S)
        self.num_tokens = self.num_tokens * keep + num_tokens
        self.busy_s = self.busy_s * keep + busy_s
        self.num_rounds = self.num_rounds * keep + 1
        tokens, seconds, rounds = self._stretch
        self._stretch = tokens, seconds, rounds = tokens + num_tokens, seconds + busy_s, rounds + 1
        is_long = rounds >= _STRETCH_ROUNDS and seconds >= _STRETCH_S
        is_short = rounds >= _SHORT_STRETCH_ROUNDS and seconds >= _SHORT_STRETCH_S
        ratio = tokens / seconds / self.tokens_per_s if seconds and tokens else 0.0
        is_usual = 1 / _CHANGE_FACTOR < ratio < _CHANGE_FACTOR
        # It may be a change and may be chance.
        is_doubtful = not is_usual and 1 / _CLEAR_FACTOR < ratio < _CLEAR_FACTOR
        if is_long and seconds < _CONFIRMED_S and is_doubtful:
            return None
        return self.end_stretch() if is_long or is_short else None

    def end_stretch(self) -> float | None:
        """Compare what came last with what is remembered; returns what `add` does."""
        tokens, seconds, rounds = self._stretch
        self._stretch = (0, 0.0, 0)
        if rounds < _SHORT_STRETCH_ROUNDS:
            return None
        self.is_fresh = True
        factor = _CHANGE_FACTOR if rounds >= _STRETCH_ROUNDS else _SHORT_CHANGE_FACTOR
        ratio = tokens / seconds / self.tokens_per_s
        if 1 / factor < ratio < factor:
            return None
        self.num_tokens, self.busy_s, self.num_rounds = tokens, seconds, rounds
        return ratio

    def scale(self, factor: float) -> None:
        """What it is a part of has changed by `factor`."""
        self.num_tokens *= factor
        self.num_rounds *= factor

    def take_up_again(self) -> None:
        """It has not been measured for a while: let what comes now count for more than what is remembered."""
        self._stretch = (0, 0.0, 0)
        self.is_fresh = False
        if self.busy_s > _STALE_WEIGHT_S:
            factor = _STALE_WEIGHT_S / self.busy_s
            self.num_tokens *= factor
            self.busy_s *= factor
            self.num_rounds *= factor


@dataclass
class CostCurve:
    """Seconds as a function of a size (rows, sessions), learned at the sizes that occur; one point an octave."""

    _points: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, size: float, seconds: float) -> None:
        octave = round(math.log2(max(size, 1.0)))
        old_size, old_seconds = self._points.get(octave, (size, seconds))
        self._points[octave] = (old_size + _RATE * (size - old_size), old_seconds + _RATE * (seconds - old_seconds))

    def predict(self, size: float) -> float | None:
        """Linear between known sizes, proportional beyond them; None if empty.

        Below the smallest that is the least it can be: what is unknown there gets tried rather than ruled out.
        """
        points = sorted(self._points.values())
        if not points:
            return None
        below = [point for point in points if point[0] <= size]
        above = [point for point in points if point[0] > size]
        if not below:
            return above[0][1] * size / above[0][0]
        if not above:
            return below[-1][1] * max(1.0, size / below[-1][0])
        (size_0, seconds_0), (size_1, seconds_1) = below[-1], above[0]
        return seconds_0 + (seconds_1 - seconds_0) * (size - size_0) / (size_1 - size_0)


@dataclass
class AcceptanceCurve:
    """How often each level of a tree is accepted, of the rounds whose tree had it; recent rounds count most."""

    _rates: list[float] = field(default_factory=list)

    def add(self, num_levels: int, num_accepted: int) -> None:
        for level in range(num_levels):
            hit = float(level < num_accepted)
            if level == len(self._rates):
                self._rates.append(hit)
            self._rates[level] += _RATE * (hit - self._rates[level])

    def expected(self, num_levels: int) -> float:
        """Accepted tokens to expect of a tree of `num_levels` levels; levels never seen go on as the last did."""
        rates = self._rates[:num_levels]
        ratio = rates[-1] / rates[-2] if len(rates) > 1 and rates[-2] > 0 else 0.5
        last = rates[-1] if rates else 0.5
        unseen = sum(last * min(ratio, 1.0) ** step for step in range(1, num_levels - len(rates) + 1))
        return sum(rates) + unseen

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(self._rates)


class VerifierLoad:
    """Sessions, other gateways' included, that share the steps of our rounds; 0 until a verdict has told."""

    def __init__(self) -> None:
        self._average: float | None = None
        self._seen_s = 0.0
        self.num_sessions = 0

    def add(self, num_batch_sessions: int, now_s: float) -> None:
        """A round that ended now was verified in a step of so many sessions."""
        if self._average is None:
            self._average = float(num_batch_sessions)
        keep = math.exp(-max(0.0, now_s - self._seen_s) / _LOAD_MEMORY_S)
        self._seen_s = now_s
        self._average = keep * self._average + (1 - keep) * num_batch_sessions
        if abs(self._average - self.num_sessions) >= _LOAD_TOLERANCE:
            self.num_sessions = round(self._average)


class BusyClock:
    """Seconds of another clock, without the seconds in which no request ran."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._read_s = clock()
        self._busy_s = 0.0

    def read(self, *, was_busy: bool) -> float:
        """Busy seconds since the clock was made; `was_busy` says whether a request ran since the last reading."""
        now_s = self._clock()
        if was_busy:
            self._busy_s += now_s - self._read_s
        self._read_s = now_s
        return self._busy_s
