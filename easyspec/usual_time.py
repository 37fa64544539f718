"""How long something usually takes, and after how long it must be taken for hung."""

from __future__ import annotations

LEAST_BOUND_S = 30.0
_FACTOR = 20.0
_RATE = 0.05


class UsualTime:
    """A running mean of durations; `bound_s` is many times that, and never less than `least_bound_s` (seconds)."""

    def __init__(self, least_bound_s: float = LEAST_BOUND_S) -> None:
        self._least_bound_s = least_bound_s
        self._mean_s = 0.0

    def learn(self, duration_s: float) -> None:
        self._mean_s += _RATE * (duration_s - self._mean_s)

    @property
    def bound_s(self) -> float:
        return max(self._least_bound_s, _FACTOR * self._mean_s)
