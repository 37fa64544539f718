"""`python -m bench who-drafts`: tokens per second by the sources asked in a round, on a clock that does not jitter.

Recorded rounds go through the drafter's own `Rounds`. Only time is made up: what the draft model, looking up, asking a
text about one place, and the rest of a round (verifier, gateway, wire) take is said by flags, so that decisions depend
on nothing else and two runs print the same. For comparing rules in drafter_service/worth.py.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, cast

from rich.console import Console

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from bench.harness.tables import Column, ResultTable
from bench.harness.tasks import TASK_NAMES
from bench.sources.recording import NUM_LEVELS, WIDTH, Recorded, record, text_resources
from drafter_service.fusion.acceptance_estimate import Judge
from drafter_service.fusion.rounds import Rounds
from drafter_service.guesser import Guesser, PathGuesser, Stated
from drafter_service.model.state import ModelState
from drafter_service.request import DraftRequest
from drafter_service.session import Learned, Session
from drafter_service.text.guessers import TextDrafting, TextResources
from drafter_service.worth import RoundChoices
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.growing_tree import num_followed
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources
from easyspec.speculation.token_tree import ScoredTree

CHOSEN = "all, where it pays"
SETS = {
    "model": DraftSources.MODEL,
    "retrieval": DraftSources.RETRIEVAL,
    "retrieval, n-grams": TEXT_SOURCES,
    "model, retrieval": DraftSources.MODEL | DraftSources.RETRIEVAL,
    "all, always": DraftSources.MODEL | TEXT_SOURCES,
    CHOSEN: DraftSources.MODEL | TEXT_SOURCES,
}
_UNUSED_PLAN = LayerPlan(groups=(range(1),))


@dataclass(frozen=True)
class WhoDraftsSettings:
    round_ms: Annotated[
        tuple[str, ...], flag("REST,MODEL: a round without drafting, and the draft model's tree.", "--round-ms")
    ] = ("2.5,3.5", "8,3", "30,14", "150,14")
    lookup_ms: Annotated[float, flag("Reading what is new, and looking it up.")] = 0.13
    retrieval_ms: Annotated[float, flag("Asking a text about one place of a tree.")] = 0.014
    ngram_ms: Annotated[float, flag("Asking n-grams about one place of a tree.")] = 0.05
    nodes: Annotated[tuple[int, ...], flag("Nodes of a tree; one or several.")] = (16, 64)
    temperatures: Annotated[tuple[float, ...], flag("One or several.", "--temperature")] = (0.0, 0.8)
    num_prompts: Annotated[int, flag("Prompts of each kind.", minimum=1)] = 8
    max_tokens: Annotated[int, flag("Tokens per completion.", minimum=1)] = 96
    seed: Annotated[int, flag("Chooses prompts and noise.")] = 7


@dataclass(frozen=True)
class Durations:
    """What the parts of a round take, in milliseconds: all but drafting, the model's tree, looking up, and asking a
    text or n-grams about one place."""

    rest: float
    model: float
    lookup: float
    retrieval: float
    ngram: float


class Clock:
    """A clock that stands still but for what it is told."""

    def __init__(self) -> None:
        self.now_ns = 0

    def advance(self, milliseconds: float) -> None:
        self.now_ns += int(milliseconds * 1e6)


class _RecordedState:
    """What a draft model has grown: the tree that was recorded."""

    def __init__(self) -> None:
        self.tree: ScoredTree | None = None
        self.exits = None

    @property
    def growing(self) -> Self:
        return self

    def scored(self) -> ScoredTree:
        assert self.tree is not None, "a round is under way"
        return self.tree


class _TimedGuesser:
    """A guesser over text whose answers take the time that they are said to."""

    def __init__(self, guesser: PathGuesser, clock: Clock, milliseconds: float) -> None:
        self._guesser = guesser
        self._clock = clock
        self._milliseconds = milliseconds
        self.kind = guesser.kind
        self.root = guesser.root
        self.step = guesser.step

    def state(self, cursor: Any, depth: int) -> Stated | None:
        self._clock.advance(self._milliseconds)
        return self._guesser.state(cursor, depth)


class _TimedText(TextDrafting):
    """A request's text, likewise."""

    clock: Clock
    durations: Durations

    def guessers(self) -> list[PathGuesser]:
        self.clock.advance(self.durations.lookup)
        own = {Guesser.NGRAM: self.durations.ngram}
        return [
            _TimedGuesser(guesser, self.clock, own.get(guesser.kind, self.durations.retrieval))
            for guesser in super().guessers()
        ]


@dataclass
class Outcome:
    """Sums over the rounds of a kind of task."""

    num_tokens: int = 0
    num_rounds: int = 0
    num_model_rounds: int = 0
    milliseconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.num_tokens / self.milliseconds

    def __str__(self) -> str:
        num_tokens, share = self.num_tokens / self.num_rounds, self.num_model_rounds / self.num_rounds
        return f"{self.tokens_per_s:.0f} ({num_tokens:.2f}; {share:.0%})"


def run(
    recorded: Sequence[Recorded],
    resources: TextResources,
    sources: DraftSources,
    num_nodes: int,
    durations: Durations,
    *,
    asks_all_sources: bool = False,
) -> dict[tuple[str, float], Outcome]:
    """Draft all recorded completions, one after the other, with a drafter that begins knowing nothing."""
    clock, learned = Clock(), Learned()
    rounds = Rounds(asks_all_sources=asks_all_sources, clock_ns=lambda: clock.now_ns)
    outcomes: dict[tuple[str, float], Outcome] = defaultdict(Outcome)
    budget = TreeBudget(NUM_LEVELS, WIDTH, num_nodes)
    for number, one in enumerate(recorded):
        request = DraftRequest(one.sampling, _UNUSED_PLAN, len(one.prompt) + len(one.output), sources=sources)
        choices = RoundChoices(learned.greedy if one.sampling.is_greedy else learned.sampled)
        session = Session(number, request, [*one.prompt], Judge(learned.estimate), choices)
        if request.asks_text:
            session.text = text = _TimedText(resources, sources, one.sampling, session.token_ids)
            text.clock, text.durations = clock, durations
        state, outcome = _RecordedState(), outcomes[one.task_name, one.sampling.temperature]
        session.model = cast("ModelState", state) if request.asks_model else None
        begun_ns, position, num_new = clock.now_ns, 0, 1
        while position + num_new < len(one.output):
            session.token_ids += one.output[position : position + num_new]
            position += num_new
            if rounds.begin(session, num_new, budget, num_sharing=1).has_model:
                clock.advance(durations.model)
                state.tree = one.model_trees[position - 1]
                outcome.num_model_rounds += 1
            tree, _ = rounds.finish(session)
            num_new = min(num_followed(tree, one.output[position:]) + 1, len(one.output) - position)
            clock.advance(durations.rest)
            outcome.num_rounds += 1
            outcome.num_tokens += num_new
        outcome.milliseconds += (clock.now_ns - begun_ns) / 1e6
    return outcomes


async def measure(settings: WhoDraftsSettings, console: Console) -> Findings:
    """One row a length of rounds, a budget of nodes and a set of sources."""
    recorded = await record(settings.num_prompts, settings.seed, settings.temperatures, settings.max_tokens)
    resources = text_resources()
    kinds = [(name, temperature) for temperature in settings.temperatures for name in TASK_NAMES]
    rows: list[dict[str, Any]] = []
    shares: list[float] = []
    for round_ms, nodes in itertools.product(settings.round_ms, settings.nodes):
        rest_ms, model_ms = map(float, round_ms.split(","))
        durations = Durations(rest_ms, model_ms, settings.lookup_ms, settings.retrieval_ms, settings.ngram_ms)
        outcomes = {
            label: run(recorded, resources, sources, nodes, durations, asks_all_sources=label != CHOSEN)
            for label, sources in SETS.items()
        }
        for kind in kinds:
            best = max(outcome[kind].tokens_per_s for label, outcome in outcomes.items() if label != CHOSEN)
            shares.append(outcomes[CHOSEN][kind].tokens_per_s / best)
        for label, outcome in outcomes.items():
            cells = {f"{name}, T = {t:g}": str(outcome[name, t]) for name, t in kinds}
            rows.append({"rest, model, ms": round_ms, "nodes": nodes, "asked": label, **cells})
    num_near = sum(share >= 0.9 for share in shares)
    columns = [Column(name, name, "d" if name == "nodes" else "") for name in rows[0]]
    title = "tokens/s (tokens a round; rounds that ask the model)"
    return Findings(
        {"results": rows},
        [ResultTable(title, columns, rows)],
        notes=[
            f"{CHOSEN}, against the best other row of each cell: {statistics.geometric_mean(shares):.2f} of it in the "
            f"mean, {min(shares):.2f} at worst, at least 0.90 in {num_near} of {len(shares)} cells"
        ],
        checkpoints=[DEFAULT_BASE, DEFAULT_DRAFT],
    )


BENCHMARK = Benchmark("python -m bench who-drafts", __doc__, WhoDraftsSettings, measure, is_markdown=True)
