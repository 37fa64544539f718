"""What is asked of the drafter's core; closing a session is `easyspec.engine.shell.CloseTask`."""

from __future__ import annotations

from dataclasses import dataclass

from easyspec.engine.device_thread import Task
from easyspec.speculation.messages import Calibration, Draft, OpenSpeculation


@dataclass(eq=False)
class OpenTask(Task[int]):
    """Open a session; the result is its id."""

    request: OpenSpeculation


@dataclass(eq=False)
class DraftTask(Task[Draft]):
    """Commit the verdict's tokens and draft the next tree, which began at `begun_ns`."""

    session_id: int
    calibration: Calibration
    begun_ns: int = 0
