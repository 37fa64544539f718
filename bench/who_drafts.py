"""`python -m bench.who_drafts`: tokens a second by who is asked in a round, on a clock that does not jitter.

Recorded rounds go through the drafter's own fusing source. Only time is made up: what the draft model, text and the
rest of a round (verifier, gateway, wire) take is said by flags, so that decisions depend on nothing else and two runs
print the same. For comparing rules in drafter_service/fusion/model_use.py and text_use.py; made the table of
docs/decisions/0021.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

from bench.recording import (
    NUM_LEVELS,
    WIDTH,
    Recorded,
    add_recording_flags,
    num_output_tokens,
    print_provenance,
    record,
    text_resources,
)
from bench.source_tasks import TASK_NAMES
from drafter_service.fusion import fusing
from drafter_service.fusion.fused_drafting import FusedDrafting
from drafter_service.fusion.fusing import FusingSource
from drafter_service.fusion.union import FusedTree
from drafter_service.source import DraftJob, DraftSession, Progress, Proposal
from drafter_service.text.guessers import TextResources
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources
from easyspec.speculation.token_tree import ScoredTree

_UNUSED_PLAN = LayerPlan(groups=(range(1),))


@dataclass(frozen=True)
class Durations:
    """What the parts of a round take, in milliseconds: text's own tree, the fused one, the model's, all the rest."""

    text: float
    fuse: float
    model: float
    rest: float


class Clock:
    """Stands in for `time` in the fusing source."""

    def __init__(self) -> None:
        self.now_ns = 0

    def monotonic_ns(self) -> int:
        """The made-up time."""
        return self.now_ns

    def advance(self, milliseconds: float) -> None:
        """Let time pass."""
        self.now_ns += int(milliseconds * 1e6)


class _RecordedModel:
    """A DraftSource that takes its time and answers with the trees that were recorded."""

    def __init__(self, clock: Clock, duration_ms: float) -> None:
        self._clock, self._duration_ms = clock, duration_ms
        self._jobs: list[DraftJob] = []
        self.tree_of: Callable[[DraftSession], ScoredTree]
        self.num_rounds = 0

    def open(self, session: DraftSession) -> None:
        pass

    def close(self, session: DraftSession) -> None:
        pass

    def abandon(self) -> Sequence[DraftSession]:
        return []

    def begin(self, job: DraftJob) -> None:
        self._jobs.append(job)

    def step(self) -> Progress:
        jobs, self._jobs = self._jobs, []
        if jobs:
            self._clock.advance(self._duration_ms)
            self.num_rounds += len(jobs)
        return Progress([Proposal(job, self.tree_of(job.session)) for job in jobs], (), has_more=False)


class _TimedDrafting(FusedDrafting):
    """FusedDrafting whose trees take the time that they are said to."""

    def __init__(self, resources: TextResources, clock: Clock, durations: Durations) -> None:
        super().__init__(resources)
        self._clock, self._durations = clock, durations

    def draft_text(self, *args: Any, **kwargs: Any) -> FusedTree:
        self._clock.advance(self._durations.text)
        return super().draft_text(*args, **kwargs)

    def finish(self, *args: Any, **kwargs: Any) -> FusedTree:
        self._clock.advance(self._durations.fuse)
        return super().finish(*args, **kwargs)


@dataclass
class Outcome:
    """Sums over the rounds of a kind of task."""

    num_tokens: int = 0
    num_rounds: int = 0
    num_model_rounds: int = 0
    milliseconds: float = 0.0

    def __str__(self) -> str:
        speed = 1e3 * self.num_tokens / self.milliseconds
        return f"{speed:.0f} ({self.num_tokens / self.num_rounds:.2f}; {self.num_model_rounds / self.num_rounds:.0%})"


def run(
    recorded: Sequence[Recorded],
    resources: TextResources,
    sources: DraftSources,
    num_nodes: int,
    durations: Durations,
    *,
    is_everybody_asked: bool = False,
) -> dict[tuple[str, float], Outcome]:
    """Draft all recorded completions, one after the other, with a drafter that begins knowing nothing."""
    clock = Clock()
    model = _RecordedModel(clock, durations.model)
    source = FusingSource(model, _TimedDrafting(resources, clock, durations), is_everybody_asked=is_everybody_asked)
    outcomes: dict[tuple[str, float], Outcome] = defaultdict(Outcome)
    budget = TreeBudget(NUM_LEVELS, WIDTH, num_nodes)
    with mock.patch.object(fusing, "time", clock):
        for session_id, one in enumerate(recorded):
            _decode(one, session_id, source, model, clock, budget, durations.rest, sources, outcomes[one.kind])
    return outcomes


def _decode(
    one: Recorded,
    session_id: int,
    source: FusingSource,
    model: _RecordedModel,
    clock: Clock,
    budget: TreeBudget,
    rest_ms: float,
    sources: DraftSources,
    outcome: Outcome,
) -> None:
    prompt, length = [*one.prompt], len(one.prompt) + len(one.output)
    session = DraftSession(session_id, prompt, length, one.sampling, _UNUSED_PLAN, calibration=True, sources=sources)
    model.tree_of = lambda drafting: one.model_trees[len(drafting.token_ids) - len(one.prompt) - 1]
    begun_ns, begun_rounds = clock.now_ns, model.num_rounds
    source.open(session)
    position, num_new = 0, 1
    while position + num_new < len(one.output):
        session.token_ids += one.output[position : position + num_new]
        position += num_new
        source.begin(DraftJob(session, num_new, budget))
        proposals: Sequence[Proposal] = ()
        while not proposals:
            proposals = source.step().proposals
        tree = proposals[0].tree.pruned(budget.num_nodes)
        num_new = num_output_tokens(tree, one.output[position:])
        clock.advance(rest_ms)
        outcome.num_rounds += 1
        outcome.num_tokens += num_new
    source.close(session)
    outcome.num_model_rounds += model.num_rounds - begun_rounds
    outcome.milliseconds += (clock.now_ns - begun_ns) / 1e6


def main(argv: Sequence[str]) -> int:
    """Print a table."""
    arguments = _parser().parse_args(argv)
    print_provenance("bench.who_drafts", argv)
    recorded = record(arguments.num_prompts, arguments.seed, arguments.temperature, arguments.max_tokens)
    resources = text_resources()
    kinds = [(name, temperature) for temperature in arguments.temperature for name in TASK_NAMES]
    print("tokens/s (tokens a round; rounds that ask the model)\n")
    print("| rest, ms | asked | " + " | ".join(f"{name}, T = {t:g}" for name, t in kinds) + " |")
    print("|---" * (len(kinds) + 2) + "|")
    everybody = DraftSources.MODEL | TEXT_SOURCES
    rows = [
        ("the model alone", DraftSources.MODEL, False),
        ("text alone", TEXT_SOURCES, False),
        ("all, always", everybody, True),
        ("all, where it pays", everybody, False),
    ]
    for rest_ms in arguments.rest_ms:
        durations = Durations(arguments.text_ms, arguments.fuse_ms, arguments.model_ms, rest_ms)
        for label, sources, always in rows:
            outcomes = run(recorded, resources, sources, arguments.nodes, durations, is_everybody_asked=always)
            cells = " | ".join(str(outcomes[kind]) for kind in kinds)
            print(f"| {rest_ms:g} | {label} | {cells} |", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.who_drafts", description=__doc__)
    add = parser.add_argument
    add("--rest-ms", type=float, nargs="+", default=[22.0, 150.0], help="a round without drafting (default: 22 150)")
    add("--model-ms", type=float, default=14.0, help="the draft model's tree (default: 14)")
    add("--text-ms", type=float, default=1.3, help="reading, looking up and text's own tree (default: 1.3)")
    add("--fuse-ms", type=float, default=2.0, help="the fused tree (default: 2)")
    add("--nodes", type=int, default=16, help="nodes of a tree (default: 16)")
    add_recording_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
