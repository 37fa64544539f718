"""`python -m bench.acceptance`: how much of a base model's answers its draft model guesses, by level of the tree.

What the base says does not depend on the drafter, so its answers are recorded once; then the draft model drafts every
round of them by itself, in this process: no services, no times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from bench.harness.pairs import PAIR, PAIRS
from bench.harness.tables import Column, ResultTable, Row
from bench.sources.recording import Recorded, record_outputs
from drafter_service.config import DrafterSettings
from drafter_service.model.drafting import ModelDrafting
from drafter_service.request import DraftRequest
from easyspec.errors import ConfigurationError
from easyspec.model.loading import load_model
from easyspec.parallel.layer_groups import sequential_plan
from easyspec.speculation.growing_tree import num_followed
from easyspec.speculation.parameters import SamplingParameters, StopConditions, TreeBudget
from gateway.text.conversation import ChatTurn, Conversation
from gateway.text.tokenizer import Tokenizer
from models.evaluation_prompts import EVALUATION_KINDS, chosen_prompts


@dataclass(frozen=True)
class AcceptanceSettings:
    pair: Annotated[str, PAIR] = "smollm2"
    base: Annotated[Path | None, flag("Another base model than the pair's.")] = None
    draft: Annotated[Path | None, flag("Another draft model than the pair's.")] = None
    kinds: Annotated[tuple[str, ...], flag("One or several.", choices=EVALUATION_KINDS)] = tuple(EVALUATION_KINDS)
    num_prompts: Annotated[int, flag("Prompts of each kind.", minimum=1)] = 8
    temperatures: Annotated[tuple[float, ...], flag("One or several.", "--temperature")] = (0.0, 0.8)
    max_tokens: Annotated[int, flag("Tokens per completion.", minimum=1)] = 128
    levels: Annotated[int, flag("Levels of a tree.", minimum=1)] = 5
    width: Annotated[int, flag("Nodes of a level that are expanded.", minimum=1)] = 4
    nodes: Annotated[int, flag("Nodes of a tree.", minimum=1)] = 16
    seed: Annotated[int, flag("Order of the prompts.")] = 7


@dataclass
class Acceptance:
    """Rounds and tokens, and by level: rounds whose answer went so far, and how many of these were right so far."""

    num_levels: int
    num_rounds: int = 0
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.num_reached = [0] * self.num_levels
        self.num_accepted = [0] * self.num_levels

    def add(self, num_accepted: int, num_left: int) -> None:
        """A round with `num_left` tokens of the answer still to come."""
        self.num_rounds += 1
        self.num_tokens += min(num_accepted + 1, num_left)
        for level in range(min(self.num_levels, num_left)):
            self.num_reached[level] += 1
            self.num_accepted[level] += level < num_accepted

    def row(self, kind: str, temperature: float) -> Row:
        levels = {
            f"level {level + 1}": f"{accepted / max(1, reached):.2f}"
            for level, (accepted, reached) in enumerate(zip(self.num_accepted, self.num_reached, strict=True))
        }
        length = self.num_tokens / max(1, self.num_rounds)
        return {
            "prompts": kind,
            "T": f"{temperature:g}",
            "rounds": self.num_rounds,
            **levels,
            "length": f"{length:.2f}",
        }


async def measure(settings: AcceptanceSettings, console: Console) -> Findings:
    """One row a temperature over all kinds, then one a kind."""
    pair = PAIRS[settings.pair]
    base, draft = settings.base or pair.base, settings.draft or pair.draft
    if draft is None:
        raise ConfigurationError(f"the pair {pair.name!r} has no draft model here; name one with --draft")
    tokenizer = Tokenizer.load(base)
    answers = [
        Recorded(kind, tuple(tokenizer.prompt_of(conversation).token_ids), SamplingParameters(index, t))
        for kind in settings.kinds
        for index, prompt in enumerate(chosen_prompts(kind, settings.num_prompts, settings.seed))
        for conversation in [Conversation((ChatTurn("user", prompt),))]
        for t in settings.temperatures
    ]
    await record_outputs(answers, base, StopConditions(settings.max_tokens))
    budget = TreeBudget(settings.levels, settings.width, settings.nodes)
    found = draft_answers(answers, draft, budget)
    rows = [found["all", t].row("all", t) for t in settings.temperatures]
    rows += [found[kind, t].row(kind, t) for t in settings.temperatures for kind in settings.kinds]
    columns = [Column(name, name) for name in rows[0]]
    return Findings({"results": rows}, [ResultTable("", columns, rows)], checkpoints=[base, draft])


def draft_answers(answers: Sequence[Recorded], draft: Path, budget: TreeBudget) -> dict[tuple[str, float], Acceptance]:
    """Draft every round of the answers, by kind (and all kinds together) and temperature."""
    settings = DrafterSettings(model=str(draft))
    loaded = load_model(settings, is_auto_8bit=True)
    drafting = ModelDrafting(loaded.decoder, loaded.memory, settings.prefill_chunk, budget.num_nodes)
    plan = sequential_plan(loaded.decoder.config.num_layers)
    found: dict[tuple[str, float], Acceptance] = {}
    for answer in answers:
        request = DraftRequest(answer.sampling, plan, len(answer.prompt) + len(answer.output))
        state = drafting.open(request, [*answer.prompt])
        sums = [
            found.setdefault((kind, answer.sampling.temperature), Acceptance(budget.num_levels))
            for kind in (answer.task_name, "all")
        ]
        position, new = 1, answer.output[:1]
        while position < len(answer.output):
            state.token_ids.extend(new)
            drafting.begin(state, budget, token_s=None)
            while not state.is_done:
                drafting.step([state])
            tree = state.growing.scored().pruned(budget.num_nodes).tree
            state.timings = None
            num_accepted = num_followed(tree, answer.output[position:])
            for acceptance in sums:
                acceptance.add(num_accepted, len(answer.output) - position)
            new = answer.output[position : position + num_accepted + 1]
            position += len(new)
        state.close()
    return found


BENCHMARK = Benchmark("python -m bench.acceptance", __doc__, AcceptanceSettings, measure, is_markdown=True)
