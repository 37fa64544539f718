"""What a benchmark asks the gateway for, and what it was told, and when."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from easyspec.errors import EasyspecError
from easyspec.speculation.parameters import LayerPlanRequest, TreeBudget
from easyspec.speculation.sources import DraftSources


class Speculation(enum.Enum):
    """The per-request setting of the gateway; the values are the report's."""

    OFF = "off"
    ON = "on"
    AUTO = "auto"


@dataclass(frozen=True)
class Task:
    """One completion to ask for, exactly `max_tokens` long; None takes the gateway's default."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    speculation: Speculation
    layer_plan: LayerPlanRequest | None = None
    sources: DraftSources | None = None
    budget: TreeBudget | None = None
    draft_ahead: bool = True


class Outcome(enum.Enum):
    """How a request ended. CUT: the load generator cancelled it, as its window was over."""

    RUNNING = "running"
    COMPLETE = "complete"
    REFUSED = "refused"
    FAILED = "failed"
    CUT = "cut"


@dataclass(frozen=True)
class Round:
    """One message of a stream: when it came by the client's clock, and what the gateway reported of its round."""

    at_s: float
    num_tokens: int
    num_accepted: int
    num_draft_tokens: int = 0
    num_batch_rows: int = 0
    num_batch_sessions: int = 0
    num_draft_levels: int = 0
    num_fuzzy_steps: int = 0
    draft_ns: int = 0
    calibrate_ns: int = 0
    fuzzy_ns: int = 0
    verify_ns: int = 0
    compute_ns: int = 0
    round_ns: int = 0


@dataclass(frozen=True)
class Counts:
    """The gateway's statistics of a completion; levels count from the first below the root."""

    num_drafted_by_level: tuple[int, ...] = ()
    num_accepted_by_level: tuple[int, ...] = ()
    num_accepted_by_source: tuple[tuple[DraftSources, int], ...] = ()
    num_drafter_failures: int = 0
    num_ahead_hits: int = 0
    num_ahead_misses: int = 0


@dataclass
class Stream:
    """A request and everything it was answered; filled in as it happens. Times are of the client's clock."""

    task: Task
    index: int
    started_s: float = 0.0
    ended_s: float = 0.0
    outcome: Outcome = Outcome.RUNNING
    rounds: list[Round] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    counts: Counts = Counts()
    retry_after_s: float | None = None
    error: EasyspecError | None = None

    @property
    def time_to_first_token_s(self) -> float | None:
        return self.rounds[0].at_s - self.started_s if self.rounds else None
