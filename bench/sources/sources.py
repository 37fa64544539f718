"""`easyspec bench sources`: every source of guesses alone, in pairs and all fused, at equal node budgets."""

from __future__ import annotations

import functools
import operator
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, ClassVar

from rich.console import Console

from bench.decode.samples import PLAIN, Mode, Planned, Sample, complete_each
from bench.harness.benchmark import Benchmark, Findings, as_plain
from bench.harness.clients import GatewayClient
from bench.harness.flags import flag
from bench.harness.pairs import PAIR, PAIRS, start_services
from bench.harness.prompts import prompts_in_turn
from bench.harness.provenance import provenance_lines
from bench.harness.tables import Column, ResultTable, Row, markdown_table
from bench.harness.turns import progress_on, rotated
from bench.sources.datastore import ensure_datastore
from bench.sources.lengths import GAIN_COLUMNS, length_gains
from easyspec.cli.processes import DRAFTER
from easyspec.speculation.parameters import LayerPlanRequest, TreeBudget
from easyspec.speculation.sources import ALL_SOURCES, SINGLE_SOURCES, TEXT_SOURCES, DraftSources, parse_sources

_NUM_LEVELS, _WIDTH = 5, 4
_NUM_WARM_UPS = 8
_ASKED = {
    "where-it-pays": "the drafter asks the sources that pay in each round",
    "always": "all sources of a request are asked in every round (`--ask always`)",
}
COLUMNS = (
    Column("task", "task"),
    Column("sources", lambda row: "+".join(row["sources"])),
    Column("nodes", "node_budget"),
    Column("T", "temperature", "g"),
    Column("length", "mean_acceptance_length", ".2f"),
    Column("draft ms", "draft_ms_per_round", ".2f"),
    Column("tokens/s", "tokens_per_s", ".1f"),
    Column("x plain", "speedup_vs_plain", ".2f"),
)


@dataclass(frozen=True)
class SourcesSettings:
    QUICK: ClassVar = {"node_budgets": (16,), "num_prompts": 2, "max_tokens": 48}

    pair: Annotated[str, PAIR] = "bundled"
    sources: Annotated[tuple[str, ...], flag("A set, say model,ngram; one or several [default: all worth a row].")] = ()
    ask: Annotated[
        str,
        flag(
            "The drafter's --ask: always shows how long fused trees are, where-it-pays how fast decoding is.",
            choices=("where-it-pays", "always"),
        ),
    ] = "where-it-pays"
    node_budgets: Annotated[tuple[int, ...], flag("Nodes of a tree; one or several.", "--nodes")] = (8, 16, 32, 64)
    temperatures: Annotated[tuple[float, ...], flag("One or several.", "--temperature")] = (0.0, 0.8)
    num_prompts: Annotated[int, flag("Prompts of each kind.", minimum=1)] = 8
    max_tokens: Annotated[int, flag("Tokens per completion.", minimum=1)] = 96
    seed: Annotated[int, flag("Chooses prompts and noise.")] = 7

    def source_sets(self) -> list[DraftSources]:
        """Raises ConfigurationError for a name that is none."""
        return [parse_sources(names.split(",")) for names in self.sources] or source_sets()


async def measure(settings: SourcesSettings, console: Console) -> Findings:
    """Start the services and ask; a completion that differs from plain decoding's makes the run fail."""
    pair = PAIRS[settings.pair]
    pair.check()
    planned = list(interleaved(prompts_in_turn(pair.prompts, settings.num_prompts, settings.seed), settings))
    console.print("preparing the index (made once)")
    flags = {DRAFTER: (*ensure_datastore(pair.base), "--ask", settings.ask)}
    async with start_services(pair, flags) as stack, GatewayClient(stack.gateway_address) as client:
        with progress_on(console) as progress:
            rows = summarize_sources(await complete_each(client, planned, _NUM_WARM_UPS, _say, progress))
    num_differing = sum(row["num_differing_completions"] for row in rows)
    sets = ["+".join(sources.names) for sources in settings.source_sets()]
    tables = [ResultTable("lengths of rounds, and medians over prompts", COLUMNS, rows)]
    if gains := length_gains(rows):
        tables.append(ResultTable("tokens a round, fused and of the best single source", GAIN_COLUMNS, gains))
    return Findings(
        content={
            "pair": pair.name,
            "settings": {**as_plain(settings), "source_sets": sets, "num_levels": _NUM_LEVELS, "width": _WIDTH},
            "results": rows,
        },
        tables=tables,
        notes=[f"{num_differing} completions differ from plain decoding (expected 0)"],
        checkpoints=pair.checkpoints,
        exit_code=1 if num_differing else 0,
    )


def source_sets() -> list[DraftSources]:
    """Model, retrieval and n-grams: each alone, the pairs, all; then early exit in the model's place and beside it."""
    independent = [source for source in SINGLE_SOURCES if source is not DraftSources.EARLY_EXIT]
    sets = [
        functools.reduce(operator.or_, members)
        for size in range(1, len(independent) + 1)
        for members in combinations(independent, size)
    ]
    early = DraftSources.EARLY_EXIT
    return [*sets, early, early | DraftSources.MODEL, early | TEXT_SOURCES, ALL_SOURCES]


def summarize_sources(samples: Sequence[Sample]) -> list[Row]:
    """One row per task, set of sources, node budget and temperature, in the order in which they were measured. Lengths
    are over all rounds with a tree; speeds are medians over prompts."""
    plain: dict[tuple[str, float, int], Sample] = {}
    groups: dict[tuple[str, DraftSources, int, float], list[Sample]] = {}
    for one in samples:
        if one.mode.layer_plan is None:
            plain[one.kind, one.temperature, one.prompt_index] = one
        else:
            groups.setdefault((one.kind, one.mode.sources, one.node_budget, one.temperature), []).append(one)
    return [_row(key, own, plain) for key, own in groups.items()]


def _row(
    key: tuple[str, DraftSources, int, float],
    samples: Sequence[Sample],
    plain: Mapping[tuple[str, float, int], Sample],
) -> Row:
    task_name, sources, node_budget, temperature = key
    drafted = [item for sample in samples for item in sample.rounds if item.num_draft_tokens]
    steady = [item for sample in samples for item in sample.steady_rounds]
    references = [plain[task_name, temperature, sample.prompt_index] for sample in samples]
    speeds = [sample.tokens_per_s or 0.0 for sample in samples]
    ratios = [speed / (other.tokens_per_s or 1.0) for speed, other in zip(speeds, references, strict=True)]
    accepted: Counter[str] = Counter()
    for sample in samples:
        accepted.update({source.names[0]: count for source, count in sample.counts.num_accepted_by_source if source})
    num_accepted = sum(item.num_accepted for item in drafted)
    return {
        "task": task_name,
        "sources": list(sources.names),
        "node_budget": node_budget,
        "temperature": temperature,
        "mean_acceptance_length": 1 + num_accepted / len(drafted) if drafted else 0.0,
        "draft_ms_per_round": statistics.fmean(item.draft_ns / 1e6 for item in steady) if steady else 0.0,
        "tokens_per_s": statistics.median(speeds),
        "speedup_vs_plain": statistics.median(ratios),
        "accepted_by_source": dict(accepted),
        "num_differing_completions": sum(
            sample.token_ids != other.token_ids for sample, other in zip(samples, references, strict=True)
        ),
    }


def interleaved(prompts: Sequence[tuple[str, str]], settings: SourcesSettings) -> Iterator[Planned]:
    """Every prompt (kind, text) plainly and with every set and budget before the next; the order of sets rotates."""
    modes = [Mode("+".join(sources.names), LayerPlanRequest(), sources) for sources in settings.source_sets()]
    for index, (kind, prompt) in enumerate(prompts):
        for temperature in settings.temperatures:
            ways = [(PLAIN, 0), *((mode, n) for n in settings.node_budgets for mode in rotated(modes, index))]
            for mode, num_nodes in ways:
                budget = TreeBudget(_NUM_LEVELS, _WIDTH, num_nodes) if num_nodes else None
                task = mode.task(prompt, settings.max_tokens, temperature, settings.seed + index, budget)
                yield Planned(mode, index, task, kind)


def _say(each: Planned) -> str:
    num_nodes = each.task.budget.num_nodes if each.task.budget else 0
    return f"{each.kind}, T = {each.task.temperature:g}, {each.mode.name}, {num_nodes} nodes"


def sources_section(name: str, report: Mapping[str, Any]) -> str:
    settings, rows = report["settings"], report["results"]
    order = sorted(rows, key=lambda row: (row["task"], row["temperature"], row["node_budget"], len(row["sources"])))
    lines = [
        f"## Sources of guesses, the {report['pair']} pair ({name})\n",
        *provenance_lines(report),
        f"* {settings['num_prompts']} held-out prompts of each kind, {settings['max_tokens']} tokens each, "
        f"seed {settings['seed']}; the index and n-gram table are of the models' training text; "
        f"{_ASKED[settings.get('ask', 'where-it-pays')]}\n",
        markdown_table(COLUMNS, order) + "\n",
    ]
    if gains := length_gains(rows):
        lines.append("Tokens a round of model, retrieval and n-grams fused, and of the best of them alone:\n")
        lines.append(markdown_table(GAIN_COLUMNS, gains) + "\n")
    return "\n".join(lines)


BENCHMARK = Benchmark("easyspec bench sources", __doc__, SourcesSettings, measure)
