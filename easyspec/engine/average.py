"""A running average, for whatever engines measure of themselves."""

from __future__ import annotations

# How fast averages of clocks follow, and as how many times the average a measurement counts at most: a pause of the
# client, or of the machine, is no cost.
CLOCK_RATE = 0.1
MAX_OUTLIER = 4.0


class Average:
    """What a number is of late; the first few count alike. It may begin as if it knew `count` numbers.

    `max_outlier` bounds a later one by the average, on either side.
    """

    def __init__(
        self, rate: float = CLOCK_RATE, max_outlier: float | None = None, value: float = 0.0, count: int = 0
    ) -> None:
        self.value = value
        self.count = count
        self._rate = rate
        self._max_outlier = max_outlier

    def add(self, number: float) -> None:
        self.count += 1
        if self._max_outlier is not None and self.count > 1 and self.value > 0.0:
            number = min(max(number, self.value / self._max_outlier), self._max_outlier * self.value)
        self.value += (number - self.value) * max(self._rate, 1.0 / self.count)


def clock_average() -> Average:
    """An average of durations, in seconds."""
    return Average(CLOCK_RATE, MAX_OUTLIER)
