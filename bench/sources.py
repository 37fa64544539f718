"""`easyspec bench sources`: every source of guesses alone, in pairs and all fused, at equal node budgets."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import operator
import shlex
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.clients import GatewayClient, Task
from bench.decode import write_report
from bench.measurement import PLAIN, Mode, Sample
from bench.pairs import PAIR_HELP, PAIRS, ModelPair, start_services
from bench.provenance import provenance
from bench.source_datastore import ensure_datastore
from bench.source_lengths import LengthGain, length_gains
from bench.source_tasks import SourceTask
from easyspec.cli.signals import run_until_signal
from easyspec.errors import ConfigurationError
from easyspec.speculation.parameters import LayerPlanRequest, TreeBudget
from easyspec.speculation.sources import ALL_SOURCES, SINGLE_SOURCES, TEXT_SOURCES, DraftSources, parse_sources

_NUM_LEVELS, _WIDTH = 5, 4
_WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class SourcesSettings:
    """One run, of which sets of sources; tasks and seeds follow from `seed`."""

    node_budgets: tuple[int, ...]
    temperatures: tuple[float, ...]
    num_prompts: int
    max_tokens: int
    seed: int
    source_sets: tuple[DraftSources, ...]
    ask: str = "where-it-pays"


@dataclass(frozen=True)
class Measured:
    """One completion: of which task, with how many nodes a tree."""

    task_name: str
    node_budget: int
    sample: Sample


@dataclass(frozen=True)
class SourcesResult:
    """One row. Lengths are over all rounds with a tree; speeds are medians over prompts."""

    task: str
    sources: list[str]
    node_budget: int
    temperature: float
    mean_acceptance_length: float
    draft_ms_per_round: float
    tokens_per_s: float
    speedup_vs_plain: float
    accepted_by_source: dict[str, int]
    num_differing_completions: int


def main(argv: list[str]) -> int:
    """Run the benchmark; returns 0, or 1 if a completion differed from plain decoding's, or 128 + a signal's number.

    Raises EasyspecError if the services do not come up or fail.
    """
    arguments = _parser().parse_args(argv)
    settings, pair, console = _settings(arguments), PAIRS[arguments.pair], Console()
    measured: list[Measured] = []

    async def run() -> None:
        measured.extend(await _measure(pair, settings, console))

    interrupted = run_until_signal(run())
    if interrupted:
        return interrupted
    results = summarize_sources(measured)
    for result in results:
        console.print(_line(result), highlight=False)
    for gain in length_gains(dataclasses.asdict(result) for result in results):
        console.print(_gain_line(gain), highlight=False)
    if arguments.json is not None:
        write_report(
            arguments.json, _report(shlex.join(["easyspec", "bench", "sources", *argv]), pair, settings, results)
        )
        console.print(f"written to {arguments.json}")
    num_differing = sum(result.num_differing_completions for result in results)
    console.print(f"{num_differing} completions differ from plain decoding (expected 0)")
    return 1 if num_differing else 0


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


def summarize_sources(measured: Sequence[Measured]) -> list[SourcesResult]:
    """One row per task, set of sources, node budget and temperature, in the order in which they were measured."""
    plain = {
        (one.task_name, one.sample.temperature, one.sample.prompt_index): one.sample
        for one in measured
        if one.sample.mode.layer_plan is None
    }
    groups: dict[tuple[str, DraftSources, int, float], list[Sample]] = {}
    for one in measured:
        if one.sample.mode.layer_plan is not None:
            key = (one.task_name, one.sample.mode.sources, one.node_budget, one.sample.temperature)
            groups.setdefault(key, []).append(one.sample)
    return [_result(key, samples, plain) for key, samples in groups.items()]


def _result(
    key: tuple[str, DraftSources, int, float],
    samples: Sequence[Sample],
    plain: Mapping[tuple[str, float, int], Sample],
) -> SourcesResult:
    task_name, sources, node_budget, temperature = key
    drafted = [item for sample in samples for item in sample.rounds if item.num_draft_tokens]
    steady = [item for sample in samples for item in sample.steady_rounds]
    references = [plain[task_name, temperature, sample.prompt_index] for sample in samples]
    speeds = [sample.tokens_per_s or 0.0 for sample in samples]
    ratios = [speed / (other.tokens_per_s or 1.0) for speed, other in zip(speeds, references, strict=True)]
    accepted: Counter[str] = Counter()
    for sample in samples:
        accepted.update({source.names[0]: count for source, count in sample.num_accepted_by_source if source})
    num_accepted = sum(item.num_accepted for item in drafted)
    return SourcesResult(
        task=task_name,
        sources=list(sources.names),
        node_budget=node_budget,
        temperature=temperature,
        mean_acceptance_length=1 + num_accepted / len(drafted) if drafted else 0.0,
        draft_ms_per_round=statistics.fmean(item.draft_ns / 1e6 for item in steady) if steady else 0.0,
        tokens_per_s=statistics.median(speeds),
        speedup_vs_plain=statistics.median(ratios),
        accepted_by_source=dict(accepted),
        num_differing_completions=sum(
            sample.token_ids != other.token_ids for sample, other in zip(samples, references, strict=True)
        ),
    )


def interleaved(tasks: Sequence[SourceTask], settings: SourcesSettings) -> Iterator[tuple[str, int, Task]]:
    """Every prompt plainly and with every set and budget before the next prompt; the order of sets rotates."""
    modes = [Mode("+".join(sources.names), LayerPlanRequest(), sources) for sources in settings.source_sets]
    for index, task in enumerate(tasks):
        shift = index % len(modes)
        for temperature in settings.temperatures:
            rounds = [(PLAIN, 0)]
            rounds += [(mode, n) for n in settings.node_budgets for mode in (*modes[shift:], *modes[:shift])]
            for mode, num_nodes in rounds:
                budget = TreeBudget(_NUM_LEVELS, _WIDTH, num_nodes) if num_nodes else None
                seed = settings.seed + index
                yield (
                    task.name,
                    num_nodes,
                    Task(index, task.prompt, mode, temperature, seed, settings.max_tokens, budget),
                )


async def _measure(pair: ModelPair, settings: SourcesSettings, console: Console) -> list[Measured]:
    pair.check()
    try:
        # The kinds take turns, so that what is learned about guessers does not favour the last one.
        prompts = [pair.prompts.of_kind(kind, settings.num_prompts, settings.seed) for kind in pair.prompts.kinds]
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    tasks = [
        SourceTask(kind, prompt)
        for group in zip(*prompts, strict=True)
        for kind, prompt in zip(pair.prompts.kinds, group, strict=True)
    ]
    console.print("preparing the index (made once)")
    flags = [*ensure_datastore(pair.base), "--ask", settings.ask]
    measured = []
    async with start_services(pair, flags) as address, GatewayClient(address, timeout_s=600.0) as client:
        planned = list(interleaved(tasks, settings))
        with Progress(console=console) as progress:
            bar = progress.add_task("warming up", total=len(planned))
            for _, _, task in planned[:8]:
                await client.complete(dataclasses.replace(task, max_tokens=_WARM_UP_TOKENS))
            for name, num_nodes, task in planned:
                progress.update(
                    bar, description=f"{name}, T = {task.temperature:g}, {task.mode.name}, {num_nodes} nodes"
                )
                measured.append(Measured(name, num_nodes, await client.complete(task)))
                progress.advance(bar)
    return measured


def _report(
    command: str, pair: ModelPair, settings: SourcesSettings, results: Sequence[SourcesResult]
) -> dict[str, Any]:
    return {
        "command": command,
        **provenance(pair.checkpoints),
        "pair": pair.name,
        "settings": dataclasses.asdict(settings)
        | {
            "num_levels": _NUM_LEVELS,
            "width": _WIDTH,
            "source_sets": ["+".join(s.names) for s in settings.source_sets],
        },
        "results": [dataclasses.asdict(result) for result in results],
    }


def _line(result: SourcesResult) -> str:
    return (
        f"{result.task:5}  T = {result.temperature:<3g}  {result.node_budget:2} nodes  {'+'.join(result.sources):22}  "
        f"length {result.mean_acceptance_length:5.2f}  draft {result.draft_ms_per_round:6.2f} ms  "
        f"{result.tokens_per_s:7.1f} tokens/s  {result.speedup_vs_plain:5.2f} x plain"
    )


def _gain_line(gain: LengthGain) -> str:
    temperature = "over all T" if gain.temperature is None else f"T = {gain.temperature:g}"
    return (
        f"{gain.task:5}  {temperature:10}  {gain.node_budget:2} nodes  fused {gain.fused:5.2f} tokens a round, best "
        f"single {gain.best_single:5.2f} ({gain.best_source}): {gain.ratio:.2f}"
    )


def _settings(arguments: argparse.Namespace) -> SourcesSettings:
    quick = arguments.quick
    return SourcesSettings(
        node_budgets=tuple(arguments.nodes or ((16,) if quick else (8, 16, 32, 64))),
        temperatures=tuple(arguments.temperature or (0.0, 0.8)),
        num_prompts=arguments.num_prompts or (2 if quick else 8),
        max_tokens=arguments.max_tokens or (48 if quick else 96),
        seed=arguments.seed,
        source_sets=tuple(parse_sources(names.split(",")) for names in arguments.sources or ()) or tuple(source_sets()),
        ask=arguments.ask,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyspec bench sources", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write results to FILE")
    add("--pair", choices=sorted(PAIRS), default="bundled", help=PAIR_HELP)
    add("--quick", action="store_true", help="16 nodes, 2 prompts of a kind, 48 tokens: minutes instead of an hour")
    add(
        "--sources",
        action="append",
        metavar="A,B",
        help="a set of sources; may be repeated (default: every set worth a row)",
    )
    add(
        "--ask",
        choices=["where-it-pays", "always"],
        default="where-it-pays",
        help="the drafter's --ask: always shows how long fused trees are, where-it-pays (default) how fast decoding is",
    )
    add("--nodes", type=int, action="append", metavar="N", help="nodes of a tree; may be repeated")
    add("--temperature", type=float, action="append", metavar="T", help="may be repeated (default: 0 and 0.8)")
    add("--num-prompts", type=int, metavar="N", help="prompts of each kind (default: 8, quick 2)")
    add("--max-tokens", type=int, metavar="N", help="tokens per completion (default: 96, quick 48)")
    add("--seed", type=int, default=7, metavar="N", help="chooses prompts and noise (default: 7)")
    return parser


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
