"""How many requests a verifier serves, of this gateway and of others, as its verdicts tell."""

from __future__ import annotations

import math

# Of a step's sessions the newest weigh most: the estimate has made two thirds of its way after this many seconds.
_MEMORY_S = 0.5
# The average must be as far from the number that is told for another one to be told: steps differ.
_TOLERANCE = 0.6


class VerifierLoad:
    """Sessions that share the steps of our rounds; 0 until a verdict has told."""

    def __init__(self) -> None:
        self._average: float | None = None
        self._seen_s = 0.0
        self.num_sessions = 0

    def add(self, num_batch_sessions: int, now_s: float) -> None:
        """A round that ended now was verified in a step of so many sessions."""
        if self._average is None:
            self._average = float(num_batch_sessions)
        keep = math.exp(-max(0.0, now_s - self._seen_s) / _MEMORY_S)
        self._seen_s = now_s
        self._average = keep * self._average + (1 - keep) * num_batch_sessions
        if abs(self._average - self.num_sessions) >= _TOLERANCE:
            self.num_sessions = round(self._average)
