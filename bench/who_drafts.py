"""`python -m bench.who_drafts`: tokens a second by who is asked in a round, on a clock that does not jitter.

Recorded rounds go through the drafter's own `Rounds`. Only time is made up: what the draft model, text and the
rest of a round (verifier, gateway, wire) take is said by flags, so that decisions depend on nothing else and two runs
print the same. For comparing rules in drafter_service/worth.py; made the table of docs/decisions/0021.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, cast

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
from drafter_service.fusion.fused_drafting import FusedDrafting
from drafter_service.fusion.learned import Learned, RoundChoices
from drafter_service.fusion.model_guesses import ModelGuesser
from drafter_service.fusion.rounds import Rounds
from drafter_service.fusion.union import FusedTree
from drafter_service.model.state import ModelState
from drafter_service.request import DraftRequest
from drafter_service.session import Session
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
    """A clock that stands still but for what it is told."""

    def __init__(self) -> None:
        self.now_ns = 0

    def read_ns(self) -> int:
        """The made-up time."""
        return self.now_ns

    def advance(self, milliseconds: float) -> None:
        """Let time pass."""
        self.now_ns += int(milliseconds * 1e6)


class _RecordedState:
    """What a draft model has grown: the tree that was recorded."""

    def __init__(self) -> None:
        self.tree: ScoredTree | None = None

    @property
    def growing(self) -> Self:
        return self

    def scored(self) -> ScoredTree:
        assert self.tree is not None, "a round is under way"
        return self.tree

    def early_rows(self, num_layers: int) -> Mapping[int, int]:
        return {}


class _TimedDrafting(FusedDrafting):
    """FusedDrafting whose trees take the time that they are said to."""

    clock: Clock
    durations: Durations
    has_own_tree = False

    def begin(self) -> None:
        self.has_own_tree = False
        super().begin()

    def fuse(self, model: ModelGuesser | None, num_nodes: int) -> FusedTree:
        self.clock.advance(self.durations.fuse if self.has_own_tree else self.durations.text)
        self.has_own_tree = True
        return super().fuse(model, num_nodes)


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
    clock, learned = Clock(), Learned()
    rounds = Rounds(is_everybody_asked=is_everybody_asked, clock_ns=clock.read_ns)
    outcomes: dict[tuple[str, float], Outcome] = defaultdict(Outcome)
    budget = TreeBudget(NUM_LEVELS, WIDTH, num_nodes)
    for number, one in enumerate(recorded):
        request = DraftRequest(one.sampling, _UNUSED_PLAN, len(one.prompt) + len(one.output), sources=sources)
        choices = RoundChoices(learned.rounds(is_greedy=one.sampling.is_greedy))
        session = Session(number, request, [*one.prompt], choices)
        if request.asks_text:
            session.text = text = _TimedDrafting(resources, request, session.token_ids, learned.estimate)
            text.clock, text.durations = clock, durations
        _decode(one, session, rounds, clock, budget, durations, outcomes[one.kind])
    return outcomes


def _decode(
    one: Recorded,
    session: Session,
    rounds: Rounds,
    clock: Clock,
    budget: TreeBudget,
    durations: Durations,
    outcome: Outcome,
) -> None:
    state = _RecordedState()
    session.model = cast("ModelState", state) if session.request.asks_model else None
    begun_ns, position, num_new = clock.now_ns, 0, 1
    while position + num_new < len(one.output):
        session.token_ids += one.output[position : position + num_new]
        position += num_new
        round_ = rounds.begin(session, num_new, budget, num_sharing=1)
        if round_.has_model:
            clock.advance(durations.model)
            state.tree = one.model_trees[position - 1]
            outcome.num_model_rounds += 1
        tree, _ = rounds.finish(session, num_layers=1)
        num_new = num_output_tokens(tree, one.output[position:])
        clock.advance(durations.rest)
        outcome.num_rounds += 1
        outcome.num_tokens += num_new
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
