"""`easyspec bench targets`: two base models behind one drafter at the same time, plain and drafted side by side."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console
from rich.progress import Progress

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.clients import GatewayClient
from bench.harness.flags import flag
from bench.harness.machine import REPOSITORY
from bench.harness.pairs import PAIRS, start_services
from bench.harness.provenance import provenance_lines
from bench.harness.streams import Speculation
from bench.harness.tables import Column, ResultTable, Row, markdown_table
from bench.harness.turns import progress_on, rotated
from bench.serving.load import LoadGenerator, Window, WindowSettings
from bench.serving.serve import TASKS_PER_TURN
from bench.serving.summary import summarize, throughput
from bench.serving.workload import MIXES, Workload
from easyspec.cli.processes import DEFAULT_BASE, DRAFTER, VERIFIER

SECOND = "base-small"
SECOND_BASES = {"bundled": DEFAULT_BASE.with_name(SECOND), "bench": REPOSITORY / ".bench" / SECOND}
_ENGINE_FLAGS = ("--num-kv-slots", "32768")
_MAX_RAMP_S = 10.0
COLUMNS = (
    Column("model", "model"),
    Column("layers", "num_layers"),
    Column("speculation", "speculation"),
    Column("tokens/s", "tokens_per_s", ".1f"),
    Column("x plain", "vs_plain", ".2f"),
    Column("x plain by turn", lambda row: " ".join(f"{ratio:.2f}" for ratio in row["vs_plain_by_turn"]) or None),
    Column("length", "mean_acceptance_length", ".2f"),
    Column("drafted", "draft_share", ".0%"),
    Column("compared", "num_compared_tokens"),
    Column("differ", "num_differing"),
)


@dataclass(frozen=True)
class TargetSettings:
    """One run: `num_turns` times one window of each setting, in rotating order, all models at the same time with
    `num_streams` streams each."""

    pair: Annotated[str, flag("Models to start (bench: widened ones).", choices=SECOND_BASES)] = "bundled"
    num_streams: Annotated[int, flag("Streams of each model at a time.", "--streams", minimum=1)] = 1
    speculations: Annotated[
        tuple[str, ...], flag("Beside off; one or both.", "--speculation", choices=("on", "auto"))
    ] = ("on",)
    num_turns: Annotated[int, flag("Windows of each setting.", "--turns", minimum=1)] = 6
    window_s: Annotated[float, flag("Seconds a window is measured.", minimum=0.1)] = 6.0
    settle_s: Annotated[float, flag("Seconds of load before the first.")] = 6.0
    mix: Annotated[str, flag("Prompts and lengths.", choices=MIXES)] = "mixed"
    timeout_s: Annotated[float, flag("Deadline of a request.")] = 120.0
    seed: Annotated[int, flag("Chooses prompts, lengths and noise.")] = 7


async def measure(settings: TargetSettings, console: Console) -> Findings:
    """Load both models; fails if a request did, or said something else than plain decoding."""
    pair = PAIRS[settings.pair]
    pair = dataclasses.replace(pair, also={SECOND: SECOND_BASES[settings.pair]}, remedy="make bench-pair")
    async with AsyncExitStack() as exits:
        stack = await exits.enter_async_context(start_services(pair, {VERIFIER: _ENGINE_FLAGS, DRAFTER: _ENGINE_FLAGS}))
        address = stack.gateway_address
        info = await (await exits.enter_async_context(GatewayClient(address, settings.timeout_s))).info()
        models = [served.base_model for served in info.served_models]
        clients = [
            await exits.enter_async_context(GatewayClient(address, settings.timeout_s, model.name)) for model in models
        ]
        with progress_on(console) as progress:
            turns = await measure_windows(clients, settings, progress)
    rows = [
        row
        for model, turns_of in zip(models, turns, strict=True)
        for row in rows_of(model.name, model.num_layers, settings.num_streams, turns_of)
    ]
    num_bad = sum(row["num_failed"] + row["num_differing"] for row in rows)
    return Findings(
        content={"pair": pair.name, "results": rows},
        tables=[ResultTable("all models at the same time; medians over windows", COLUMNS, rows)],
        notes=[f"{num_bad} requests failed or said something else than plain decoding (expected 0)"],
        checkpoints=pair.checkpoints,
        exit_code=1 if num_bad else 0,
    )


async def measure_windows(
    clients: Sequence[GatewayClient], settings: TargetSettings, progress: Progress
) -> list[list[dict[Speculation, Window]]]:
    """For each model, by turn, the windows of each setting; those of all models were measured at the same time."""
    workload = Workload(settings.mix, settings.seed)
    speculations = [Speculation.OFF, *(Speculation(name) for name in settings.speculations)]
    generators = [LoadGenerator(client, None, workload) for client in clients]
    window_settings = WindowSettings(settings.num_streams, settings.window_s, _MAX_RAMP_S)

    async def at_once(wanted: WindowSettings, speculation: Speculation, first_index: int) -> list[Window]:
        together = asyncio.Barrier(len(generators))
        runs = (generator.run(wanted, speculation, first_index, together) for generator in generators)
        return list(await asyncio.gather(*runs))

    bar = progress.add_task("settling", total=1 + settings.num_turns * len(speculations))
    await at_once(dataclasses.replace(window_settings, window_s=settings.settle_s), Speculation.ON, 0)
    progress.advance(bar)
    turns: list[list[dict[Speculation, Window]]] = [[] for _ in generators]
    for turn in range(settings.num_turns):
        for windows_of in turns:
            windows_of.append({})
        for speculation in rotated(speculations, turn):
            progress.update(bar, description=speculation.value)
            windows = await at_once(window_settings, speculation, (turn + 1) * TASKS_PER_TURN)
            for windows_of, window in zip(turns, windows, strict=True):
                windows_of[-1][speculation] = window
            progress.advance(bar)
    return turns


def rows_of(model: str, num_layers: int, num_streams: int, turns: Sequence[dict[Speculation, Window]]) -> list[Row]:
    """One base model under each setting, while the others were under the same.

    `vs_plain` is the median of per-turn ratios to `off`. Of every task that `off` was given in the same turn, as many
    tokens as both came to are compared; `num_differing` counts the tasks in which some differed.
    """
    rows: list[Row] = []
    for found in summarize(num_streams, [list(turn.values()) for turn in turns]):
        speculation = Speculation(found["speculation"])
        pairs = [(turn[speculation], turn[Speculation.OFF]) for turn in turns if speculation is not Speculation.OFF]
        ratios = [throughput(window) / max(throughput(plain), 1e-9) for window, plain in pairs]
        compared = [_compare(plain, window) for window, plain in pairs]
        rows.append(
            {
                "model": model,
                "num_layers": num_layers,
                "speculation": found["speculation"],
                "tokens_per_s": found["tokens_per_s"],
                "tokens_per_s_by_turn": found["tokens_per_s_by_window"],
                "vs_plain": statistics.median(ratios) if ratios else None,
                "vs_plain_by_turn": ratios,
                "mean_acceptance_length": found["mean_acceptance_length"],
                "draft_share": found["draft_share"],
                "num_compared_tokens": sum(num_tokens for num_tokens, _ in compared),
                "num_differing": sum(num_differing for _, num_differing in compared),
                "num_failed": found["num_failed"],
            }
        )
    return rows


def _compare(plain: Window, drafted: Window) -> tuple[int, int]:
    """Over the tasks that both windows began: tokens compared, and tasks in which some of them differ."""
    said = {stream.index: stream.token_ids for stream in plain.streams}
    num_tokens = num_differing = 0
    for stream in drafted.streams:
        length = min(len(stream.token_ids), len(said.get(stream.index, [])))
        num_tokens += length
        num_differing += stream.token_ids[:length] != said.get(stream.index, [])[:length]
    return num_tokens, num_differing


def targets_section(name: str, report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    streams = "1 stream" if settings["num_streams"] == 1 else f"{settings['num_streams']} streams"
    return "\n".join(
        [
            f"## Two base models behind one drafter: the {report['pair']} ones ({name})\n",
            "All models have the same load at the same time; windows without and with drafts next to each other, in",
            "rotating order. *x plain* is the median of per-turn ratios of a model to itself, *compared* the tokens of",
            "requests that were asked both ways, *differ* the requests that said something else.\n",
            *provenance_lines(report),
            f"* {streams} of each model, mix {settings['mix']}, seed {settings['seed']}; "
            f"{settings['num_turns']} windows of {settings['window_s']:g} s of each setting\n",
            markdown_table(COLUMNS, report["results"]) + "\n",
        ]
    )


BENCHMARK = Benchmark("easyspec bench targets", __doc__, TargetSettings, measure)
