"""What one request of a load test was told, and when."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from bench.serving.workload import Task


class Outcome(enum.Enum):
    """How a request ended. CUT: the load generator cancelled it, as its window was over."""

    RUNNING = "running"
    COMPLETE = "complete"
    REFUSED = "refused"
    FAILED = "failed"
    CUT = "cut"


@dataclass(frozen=True)
class Chunk:
    """One message of a stream; `at_s` by the client's clock."""

    at_s: float
    num_tokens: int
    num_accepted: int
    num_draft_tokens: int
    num_batch_rows: int
    num_batch_sessions: int


@dataclass
class Stream:
    """A request and everything it was answered; filled in as it happens. Times are of the client's clock."""

    task: Task
    index: int
    started_s: float = 0.0
    ended_s: float = 0.0
    outcome: Outcome = Outcome.RUNNING
    chunks: list[Chunk] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    retry_after_s: float | None = None
    error: str = ""

    @property
    def time_to_first_token_s(self) -> float | None:
        return self.chunks[0].at_s - self.started_s if self.chunks else None
