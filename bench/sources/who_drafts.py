"""`python -m bench who-drafts`: tokens per second by the sources asked in a round, on a clock that does not jitter.

Recorded rounds go through the drafter's own `Rounds`. Only time is made up: what the draft model, text and the
rest of a round (verifier, gateway, wire) take is said by flags, so that decisions depend on nothing else and two runs
print the same. For comparing rules in drafter_service/worth.py; made the table of docs/decisions/0021.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, cast

from rich.console import Console

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from bench.harness.tables import Column, ResultTable
from bench.harness.tasks import TASK_NAMES
from bench.sources.recording import NUM_LEVELS, WIDTH, Recorded, num_output_tokens, record, text_resources
from drafter_service.fusion.acceptance_estimate import Judge
from drafter_service.fusion.rounds import ModelGuesser, Rounds
from drafter_service.fusion.union import FusedTree
from drafter_service.model.state import ModelState
from drafter_service.request import DraftRequest
from drafter_service.session import Learned, Round, Session
from drafter_service.text.guessers import TextDrafting, TextResources
from drafter_service.worth import RoundChoices
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources
from easyspec.speculation.token_tree import ScoredTree

_UNUSED_PLAN = LayerPlan(groups=(range(1),))


@dataclass(frozen=True)
class WhoDraftsSettings:
    """One run: what the parts of a round take, and what is recorded, by `seed`."""

    rest_ms: Annotated[tuple[float, ...], flag("A round without drafting.")] = (22.0, 150.0)
    model_ms: Annotated[float, flag("The draft model's tree.")] = 14.0
    text_ms: Annotated[float, flag("Reading, looking up and text's own tree.")] = 1.3
    fuse_ms: Annotated[float, flag("The fused tree.")] = 2.0
    nodes: Annotated[int, flag("Nodes of a tree.", minimum=1)] = 16
    temperatures: Annotated[tuple[float, ...], flag("One or several.", "--temperature")] = (0.0, 0.8)
    num_prompts: Annotated[int, flag("Prompts of each kind.", minimum=1)] = 8
    max_tokens: Annotated[int, flag("Tokens per completion.", minimum=1)] = 128
    seed: Annotated[int, flag("Chooses prompts and noise.")] = 7


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
        self.exits = None

    @property
    def growing(self) -> Self:
        return self

    def scored(self) -> ScoredTree:
        assert self.tree is not None, "a round is under way"
        return self.tree


class _TimedRounds(Rounds):
    """Rounds whose trees take the time that they are said to."""

    def __init__(self, clock: Clock, durations: Durations, *, asks_all_sources: bool) -> None:
        super().__init__(asks_all_sources=asks_all_sources, clock_ns=clock.read_ns)
        self._clock = clock
        self._durations = durations

    def fuse(self, session: Session, round_: Round, model: ModelGuesser | None, num_nodes: int) -> FusedTree:
        has_own_tree = round_.text_tree is not None
        self._clock.advance(self._durations.fuse if has_own_tree else self._durations.text)
        return super().fuse(session, round_, model, num_nodes)


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
    asks_all_sources: bool = False,
) -> dict[tuple[str, float], Outcome]:
    """Draft all recorded completions, one after the other, with a drafter that begins knowing nothing."""
    clock, learned = Clock(), Learned()
    rounds = _TimedRounds(clock, durations, asks_all_sources=asks_all_sources)
    outcomes: dict[tuple[str, float], Outcome] = defaultdict(Outcome)
    budget = TreeBudget(NUM_LEVELS, WIDTH, num_nodes)
    for number, one in enumerate(recorded):
        request = DraftRequest(one.sampling, _UNUSED_PLAN, len(one.prompt) + len(one.output), sources=sources)
        choices = RoundChoices(learned.greedy if one.sampling.is_greedy else learned.sampled)
        session = Session(number, request, [*one.prompt], Judge(learned.estimate), choices)
        if request.asks_text:
            session.text = TextDrafting(resources, sources, one.sampling, session.token_ids)
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
        tree, _ = rounds.finish(session)
        num_new = num_output_tokens(tree, one.output[position:])
        clock.advance(durations.rest)
        outcome.num_rounds += 1
        outcome.num_tokens += num_new
    outcome.milliseconds += (clock.now_ns - begun_ns) / 1e6


async def measure(settings: WhoDraftsSettings, console: Console) -> Findings:
    """One row a rest and a choice of sources."""
    recorded = await record(settings.num_prompts, settings.seed, settings.temperatures, settings.max_tokens)
    resources = text_resources()
    kinds = [(name, temperature) for temperature in settings.temperatures for name in TASK_NAMES]
    everything = DraftSources.MODEL | TEXT_SOURCES
    choices = [
        ("the model alone", DraftSources.MODEL, False),
        ("text alone", TEXT_SOURCES, False),
        ("all, always", everything, True),
        ("all, where it pays", everything, False),
    ]
    rows: list[dict[str, Any]] = []
    for rest_ms in settings.rest_ms:
        durations = Durations(settings.text_ms, settings.fuse_ms, settings.model_ms, rest_ms)
        for label, sources, always in choices:
            outcomes = run(recorded, resources, sources, settings.nodes, durations, asks_all_sources=always)
            cells = {f"{name}, T = {t:g}": str(outcomes[name, t]) for name, t in kinds}
            rows.append({"rest, ms": rest_ms, "asked": label, **cells})
    columns = [Column(name, name, "g" if name == "rest, ms" else "") for name in rows[0]]
    title = "tokens/s (tokens a round; rounds that ask the model)"
    return Findings({"results": rows}, [ResultTable(title, columns, rows)], checkpoints=[DEFAULT_BASE, DEFAULT_DRAFT])


BENCHMARK = Benchmark("python -m bench who-drafts", __doc__, WhoDraftsSettings, measure, is_markdown=True)
