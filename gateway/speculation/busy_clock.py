"""Time during which requests run."""

from __future__ import annotations

from collections.abc import Callable


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
