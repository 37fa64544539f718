"""What one request cost and what speculation did for it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import TokenTree
from gateway.decode_loop import Round


@dataclass(frozen=True)
class RoundTimings:
    """Cost of one round as the gateway saw it; `generation.proto` states each field."""

    draft_ns: int
    calibrate_ns: int
    fuzzy_ns: int
    verify_ns: int
    compute_ns: int
    round_ns: int
    num_draft_tokens: int
    num_draft_levels: int
    num_fuzzy_steps: int
    num_batch_rows: int
    num_batch_sessions: int
    ahead_ns: int | None = None

    @property
    def milliseconds(self) -> dict[str, float]:
        """Its durations by their names, without their unit."""
        names = ("draft", "calibrate", "fuzzy", "verify", "compute", "round")
        return {name: getattr(self, f"{name}_ns") / 1e6 for name in names}


NO_ROUND = RoundTimings(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class RoundTrace:
    """For display: the tree of a round, empty if nothing was drafted, the text of each of its nodes alone, and the rows
    that were accepted and emitted, from the top down."""

    draft_tree: TokenTree
    draft_token_texts: tuple[str, ...]
    accepted_rows: tuple[int, ...]


@dataclass(frozen=True)
class SourceStatistics:
    """What one source of guesses did for one request."""

    source: DraftSources
    num_draft_tokens: int
    num_accepted_tokens: int


@dataclass(frozen=True)
class SpeculationStatistics:
    """What speculation did for one request; `generation.proto` states each field."""

    num_rounds: int
    num_draft_rounds: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_drafted_by_level: tuple[int, ...]
    num_accepted_by_level: tuple[int, ...]
    mean_acceptance_length: float
    num_drafter_failures: int
    total_ns: int
    time_to_first_token_ns: int
    num_verifier_failures: int
    sources: tuple[SourceStatistics, ...] = ()
    num_ahead_hits: int = 0
    num_ahead_misses: int = 0
    ahead_saved_ns: int = 0


class StatisticsRecorder:
    """Counts the rounds of one request; `arrival_ns` is when it came, by the monotonic clock."""

    def __init__(self, arrival_ns: int) -> None:
        self._arrival_ns = arrival_ns
        self._first_ns: int | None = None
        self._previous_ns = time.monotonic_ns()
        self._num_rounds = 0
        self._num_draft_rounds = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0
        self._num_drafted_by_level: list[int] = []
        self._num_accepted_by_level: list[int] = []
        self._ahead_ns: list[int] = []  # of rounds behind which something was guessed
        self._num_drafted_by_source: Counter[DraftSources] = Counter()
        self._num_accepted_by_source: Counter[DraftSources] = Counter()

    def record(self, round_: Round, num_accepted: int) -> RoundTimings:
        """Count a round that has just ended, of whose draft tokens `num_accepted` were emitted."""
        round_ns, self._previous_ns = round_.ended_ns - self._previous_ns, round_.ended_ns
        self._first_ns = self._first_ns or round_.ended_ns
        tree = round_.draft.tree
        self._num_rounds += 1
        self._num_draft_rounds += len(tree) > 0
        self._num_draft_tokens += len(tree)
        self._num_accepted_tokens += num_accepted
        missing_levels = tree.num_levels - len(self._num_drafted_by_level)
        self._num_drafted_by_level.extend([0] * missing_levels)
        self._num_accepted_by_level.extend([0] * missing_levels)
        for level in range(tree.num_levels):
            self._num_drafted_by_level[level] += 1
            self._num_accepted_by_level[level] += level < num_accepted
        if node_sources := round_.draft.node_sources:
            for sources in node_sources:
                self._num_drafted_by_source.update(sources)
            for row in round_.answer.verdict.accepted_rows[:num_accepted]:
                self._num_accepted_by_source.update(node_sources[row - 1])
        ahead_ns = round_.draft.timings.ahead_ns
        self._ahead_ns += [] if ahead_ns is None else [ahead_ns]
        return RoundTimings(
            draft_ns=round_.draft.elapsed_ns,
            calibrate_ns=round_.draft.timings.calibrate_ns,
            fuzzy_ns=round_.draft.timings.fuzzy_ns,
            verify_ns=round_.answer.elapsed_ns,
            compute_ns=round_.answer.timings.compute_ns,
            round_ns=round_ns,
            num_draft_tokens=len(tree),
            num_draft_levels=tree.num_levels,
            num_fuzzy_steps=round_.draft.timings.num_fuzzy_steps,
            num_batch_rows=round_.answer.timings.num_batch_rows,
            num_batch_sessions=round_.answer.timings.num_batch_sessions,
            ahead_ns=ahead_ns,
        )

    def finish(self, num_drafter_failures: int, num_verifier_failures: int) -> SpeculationStatistics:
        """The counts so far, and the time."""
        mean = 1 + self._num_accepted_tokens / self._num_draft_rounds if self._num_draft_rounds else 0.0
        first_ns = self._first_ns or time.monotonic_ns()
        return SpeculationStatistics(
            num_rounds=self._num_rounds,
            num_draft_rounds=self._num_draft_rounds,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            num_drafted_by_level=tuple(self._num_drafted_by_level),
            num_accepted_by_level=tuple(self._num_accepted_by_level),
            mean_acceptance_length=mean,
            num_drafter_failures=num_drafter_failures,
            total_ns=time.monotonic_ns() - first_ns,
            time_to_first_token_ns=first_ns - self._arrival_ns,
            num_verifier_failures=num_verifier_failures,
            sources=tuple(
                SourceStatistics(source, count, self._num_accepted_by_source[source])
                for source, count in sorted(self._num_drafted_by_source.items())
            ),
            num_ahead_hits=sum(ahead_ns > 0 for ahead_ns in self._ahead_ns),
            num_ahead_misses=self._ahead_ns.count(0),
            ahead_saved_ns=sum(self._ahead_ns),
        )
