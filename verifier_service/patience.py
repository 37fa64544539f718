"""Whether a step that could begin waits a little for sessions that are about to come back (docs/decisions/0006).

A session that decodes plainly comes back a millisecond or two after its verdict. A step that begins at once leaves it
behind, and it then waits for a whole step: two such sessions take turns, each in a batch of one, at the speed of one.
A wait that is short against the step brings them together, and they stay together, as they are answered together. A
session that drafts comes back much later: no step waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

# How much of the last step's duration a step may wait.
_MAX_SHARE = 0.35
_MAX_WAIT_NS = 20_000_000
# A session is given this much more than it usually takes.
_LENIENCY = 1.3
_MEMORY = 0.5


class Returning(Protocol):
    """A session, as far as it matters here: when it was answered, and how long it usually takes to ask again."""

    last_verdict_ns: int | None
    turnaround_ns: float | None


class Patience:
    """Times are nanoseconds of one clock."""

    def __init__(self) -> None:
        self._step_ns = 0
        self._due: list[tuple[int, Returning]] | None = None

    def came_back(self, session: Returning, now: int) -> None:
        """The session asks for its next verdict."""
        if session.last_verdict_ns is None:
            return
        turnaround_ns = float(now - session.last_verdict_ns)
        known = session.turnaround_ns
        session.turnaround_ns = turnaround_ns if known is None else known + _MEMORY * (turnaround_ns - known)

    def stepped(self, duration_ns: int) -> None:
        """A step is over; a further wait begins anew."""
        self._step_ns = duration_ns
        self._due = None

    def wait_ns(
        self, absent: Iterable[Returning], now: int, is_absent: Callable[[Returning], bool] = lambda _session: True
    ) -> int:
        """How much longer the step should wait for those of `absent` that will be back in time; 0 to begin.

        They are looked at once after a step; asked again, as each comes back, it looks at which `is_absent` still.
        """
        if self._due is None:
            latest = now + min(int(_MAX_SHARE * self._step_ns), _MAX_WAIT_NS)
            due = [
                (session.last_verdict_ns + int(_LENIENCY * session.turnaround_ns), session)
                for session in absent
                if session.last_verdict_ns is not None and session.turnaround_ns is not None
            ]
            self._due = sorted(((at, session) for at, session in due if at <= latest), key=lambda entry: entry[0])
        while self._due and not is_absent(self._due[-1][1]):
            self._due.pop()
        return max(0, self._due[-1][0] - now) if self._due else 0
