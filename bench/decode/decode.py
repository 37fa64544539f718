"""`easyspec bench decode`: plain, sequential and layer-parallel drafting, interleaved on held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from rich.console import Console

from bench.decode.samples import Mode, Planned, complete_each, select_modes
from bench.decode.summary import summarize
from bench.harness.benchmark import Benchmark, Findings, as_plain
from bench.harness.clients import GatewayClient, describe_model
from bench.harness.flags import flag
from bench.harness.pairs import PAIR, PAIRS, start_services
from bench.harness.provenance import provenance_lines
from bench.harness.tables import Column, ResultTable, markdown_table
from bench.harness.turns import progress_on, rotated
from easyspec.errors import ConfigurationError
from easyspec.rpc.convert import budget_from_pb
from easyspec.speculation.parameters import TreeBudget

COLUMNS = (
    Column("mode", "mode"),
    Column("T", "temperature", "g"),
    Column("tokens/s", "tokens_per_s", ".1f"),
    Column("x plain", "speedup_vs_plain", ".2f"),
    Column("draft ms", "draft_ms_per_round", ".2f"),
    Column("calibrate ms", "calibrate_ms_per_round", ".2f", is_detail=True),
    Column("fuzzy ms", "fuzzy_ms_per_round", ".2f", is_detail=True),
    Column("ms/fuzzy step", "fuzzy_ms_per_step", ".2f"),
    Column("verify ms", "verify_ms_per_round", ".2f"),
    Column("overhead ms", "overhead_ms_per_round", ".2f"),
    Column("rate", "acceptance_rate", ".3f"),
    Column(
        "rate by level", lambda row: " ".join(f"{x:.2f}" for x in row["acceptance_by_level"]) or None, is_detail=True
    ),
    Column("length", "mean_acceptance_length", ".2f"),
    Column("differ", "num_differing_completions"),
)


@dataclass(frozen=True)
class DecodeSettings:
    QUICK: ClassVar = {"modes": "sequential,n4-*", "num_prompts": 3, "max_tokens": 48}

    pair: Annotated[str, PAIR] = "bundled"
    modes: Annotated[str, flag("Mode names or shell patterns, say 'sequential,n4-*'.")] = "*"
    temperatures: Annotated[tuple[float, ...], flag("One or several.", "--temperature")] = (0.0, 0.8)
    num_prompts: Annotated[int, flag("Held-out prompts.", minimum=1)] = 8
    max_tokens: Annotated[int, flag("Tokens per completion.", minimum=1)] = 96
    max_prompt_chars: Annotated[int, flag("Longest prompt.", minimum=1)] = 600
    seed: Annotated[int, flag("Chooses prompts and noise.")] = 7
    budget: Annotated[
        tuple[int, int, int] | None, flag("Tree [default: the gateway's].", metavar="LEVELS WIDTH NODES")
    ] = None

    @property
    def tree_budget(self) -> TreeBudget | None:
        return TreeBudget(*self.budget) if self.budget else None


async def measure(settings: DecodeSettings, console: Console) -> Findings:
    """Start the services and ask; a completion that differs from plain decoding's makes the run fail."""
    pair, modes = PAIRS[settings.pair], select_modes(settings.modes.split(","))
    pair.check()
    try:
        prompts = pair.prompts.some(settings.num_prompts, settings.seed, settings.max_prompt_chars)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    async with start_services(pair) as stack, GatewayClient(stack.gateway_address) as client:
        info = await client.info(needs_drafter=True)
        models = {"base": describe_model(info.models[0]), "draft": describe_model(info.draft_model)}
        console.print("\n".join(f"{role}: {model}" for role, model in models.items()))
        planned = list(interleaved(prompts, modes, settings))
        with progress_on(console) as progress:
            samples = await complete_each(client, planned, len(modes), _say, progress)
    results = summarize(samples)
    budget = settings.tree_budget or budget_from_pb(info.default_budget)
    num_failures = sum(row["num_drafter_failures"] for row in results)
    num_differing = sum(row["num_differing_completions"] for row in results)
    notes = [f"{num_differing} of {len(samples)} completions differ from plain decoding (expected 0)"]
    if num_failures:
        notes.append(f"{num_failures} drafts failed or came late; their rounds were plain, so the figures mislead")
    title = "decode phase, medians over prompts; times per round"
    return Findings(
        content={
            "pair": {"name": pair.name, **models},
            "settings": {**as_plain(settings), "budget": budget},
            "results": results,
        },
        tables=[ResultTable(title, COLUMNS, results)],
        notes=notes,
        checkpoints=pair.checkpoints,
        exit_code=1 if num_differing else 0,
    )


def interleaved(prompts: Sequence[str], modes: Sequence[Mode], settings: DecodeSettings) -> Iterator[Planned]:
    """Every prompt in every mode before the next prompt; the order of modes rotates from prompt to prompt."""
    for index, prompt in enumerate(prompts):
        for temperature in settings.temperatures:
            for mode in rotated(modes, index):
                seed = settings.seed + index
                task = mode.task(prompt, settings.max_tokens, temperature, seed, settings.tree_budget)
                yield Planned(mode, index, task)


def _say(each: Planned) -> str:
    return f"prompt {each.prompt_index + 1}, T = {each.task.temperature}, {each.mode.name}"


def decode_section(name: str, report: Mapping[str, Any]) -> str:
    pair, settings = report["pair"], report["settings"]
    budget = settings["budget"]
    return "\n".join(
        [
            f"## The {pair['name']} pair ({name})\n",
            f"* base: {pair['base']}\n* draft: {pair['draft']}",
            *provenance_lines(report),
            f"* {settings['num_prompts']} held-out prompts of at most {settings['max_prompt_chars']} characters, "
            f"{settings['max_tokens']} tokens each, seed {settings['seed']}; trees of {budget['num_levels']} levels, "
            f"width {budget['width']}, at most {budget['num_nodes']} nodes\n",
            markdown_table(COLUMNS, report["results"]) + "\n",
        ]
    )


BENCHMARK = Benchmark("easyspec bench decode", __doc__, DecodeSettings, measure)
