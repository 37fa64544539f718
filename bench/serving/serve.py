"""`easyspec bench serve`: many streams at once, speculation off, on and auto side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from rich.console import Console
from rich.progress import Progress

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.clients import GatewayClient
from bench.harness.flags import flag
from bench.harness.pairs import PAIR, PAIRS, ModelPair, start_services
from bench.harness.prompts import HELD_OUT_TEXT, PairPrompts
from bench.harness.provenance import provenance_lines
from bench.harness.streams import Speculation
from bench.harness.tables import Column, ResultTable, Row, markdown_table
from bench.harness.turns import progress_on, rotated
from bench.serving.load import LoadGenerator, Window, WindowSettings
from bench.serving.overload import OverloadSettings, run_overload
from bench.serving.summary import summarize
from bench.serving.workload import MIXES, Workload
from easyspec.cli.processes import DRAFTER, GATEWAY, VERIFIER

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
# Tasks of one window are not those of another, but the same for all settings of a turn.
TASKS_PER_TURN = 10_000
# Room for the largest concurrency with the longest prompts of the mixes.
_ENGINE_FLAGS = ("--num-kv-slots", "98304")
_MOST_REQUESTS = 64


def _percentiles(values: Mapping[str, float] | None) -> str | None:
    return None if values is None else "/".join(f"{values[name]:.0f}" for name in ("p50", "p95", "p99"))


def _vs_best(row: Mapping[str, Any]) -> str | None:
    value, error = row["vs_best"], row.get("vs_best_error")
    return None if value is None else f"{value:.2f}" + ("" if error is None else f" ± {error:.2f}")


COLUMNS = (
    Column("streams", "concurrency"),
    Column("speculation", "speculation"),
    Column("tokens/s", "tokens_per_s", ".1f"),
    Column("x best", _vs_best),
    Column("TTFT ms", lambda row: _percentiles(row["ttft_ms"])),
    Column("inter-token ms", lambda row: _percentiles(row["inter_token_ms"])),
    Column("length", "mean_acceptance_length", ".2f"),
    Column("drafted", "draft_share", ".0%"),
    Column("occupancy", "batch_occupancy", ".2f"),
    Column("rows", "batch_rows", ".1f"),
    Column("KV use", "kv_use", ".2f"),
)


@dataclass(frozen=True)
class ServeSettings:
    """One run. `settle_s` of unmeasured load in auto precede each concurrency; then `num_turns` times one window of
    each setting, in rotating order."""

    QUICK: ClassVar = {"num_turns": 2, "window_s": 3.0, "max_ramp_s": 2.0, "settle_s": 4.0}

    gateway: Annotated[str, flag("host:port of a running gateway [default: services started on --pair].")] = ""
    verifier: Annotated[str, flag("host:port of its verifier, which is asked how full its KV pool is.")] = ""
    pair: Annotated[str, PAIR] = "bundled"
    concurrencies: Annotated[tuple[int, ...], flag("Streams at a time.", "--concurrency")] = CONCURRENCIES
    speculations: Annotated[
        tuple[str, ...], flag("One or several.", "--speculation", choices=[item.value for item in Speculation])
    ] = ("off", "on", "auto")
    num_turns: Annotated[int, flag("Windows of each setting.", "--turns", minimum=1)] = 6
    window_s: Annotated[float, flag("Seconds a window is measured.", minimum=0.1)] = 6.0
    max_ramp_s: Annotated[float, flag("Most seconds until every stream has begun.")] = 10.0
    settle_s: Annotated[float, flag("Seconds of auto before each concurrency.")] = 15.0
    mix: Annotated[str, flag("Prompts and lengths.", choices=MIXES)] = "mixed"
    seed: Annotated[int, flag("Chooses prompts, lengths and noise.")] = 7
    rate: Annotated[float | None, flag("Poisson arrivals per second [default: a closed loop].", minimum=1e-6)] = None
    timeout_s: Annotated[float, flag("Deadline of a request.")] = 120.0
    overload_s: Annotated[float | None, flag("Instead of all that: offer 3 x capacity for so many seconds.")] = None
    plot: Annotated[
        Path | None, flag("Draw throughput and latencies (PNG; needs the extra bench).", metavar="FILE")
    ] = None


async def measure(settings: ServeSettings, console: Console) -> Findings:
    """Load the services; fails if a request did, or an overload did not pass."""
    pair = PAIRS[settings.pair]
    overload: Row | None = None
    rows: list[Row] = []
    async with AsyncExitStack() as exits:
        gateway, verifier = await exits.enter_async_context(_services(settings, pair))
        client = await exits.enter_async_context(GatewayClient(gateway, settings.timeout_s))
        info = await client.info()
        progress = exits.enter_context(progress_on(console))
        if settings.overload_s is None:
            rows = await measure_windows(client, verifier, settings, progress, pair.prompts)
        else:
            wanted = OverloadSettings(settings.overload_s, concurrency=max(settings.concurrencies))
            workload = Workload(settings.mix, settings.seed, pair.prompts)
            overload = await run_overload(client, workload, wanted, progress)
    if settings.plot is not None:
        from bench.serving.plot import write_plot  # brings matplotlib along, which only this needs

        write_plot(rows, settings.plot)
    num_failed = sum(row["num_failed"] for row in rows)
    notes = [f"{num_failed} requests failed"] if num_failed else []
    notes += [overload["verdict"]] if overload is not None else []
    return Findings(
        content={
            "pair": {
                "name": settings.gateway or pair.name,
                "base": info.models[0].name if info.models else "",
                "draft": info.draft_model.name,
            },
            "results": rows,
            "overload": overload,
        },
        tables=[ResultTable("medians over windows; times are p50/p95/p99", COLUMNS, rows)],
        notes=notes,
        checkpoints=[] if settings.gateway else pair.checkpoints,
        exit_code=1 if num_failed or (overload is not None and not overload["is_passed"]) else 0,
    )


async def measure_windows(
    client: GatewayClient,
    verifier: str | None,
    settings: ServeSettings,
    progress: Progress,
    source: PairPrompts = HELD_OUT_TEXT,
) -> list[Row]:
    """All concurrencies one after the other, their settings interleaved."""
    generator = LoadGenerator(client, verifier, Workload(settings.mix, settings.seed, source))
    speculations = [Speculation(name) for name in settings.speculations]
    num_windows = 1 + settings.num_turns * len(speculations)
    bar = progress.add_task("starting", total=len(settings.concurrencies) * num_windows)
    rows: list[Row] = []
    for concurrency in settings.concurrencies:
        window_settings = WindowSettings(concurrency, settings.window_s, settings.max_ramp_s, settings.rate)
        progress.update(bar, description=f"{concurrency} streams: settling")
        settling = dataclasses.replace(window_settings, window_s=settings.settle_s)
        await generator.run(settling, Speculation.AUTO, 0)
        progress.advance(bar)
        turns: list[list[Window]] = []
        for turn in range(settings.num_turns):
            windows = []
            for speculation in rotated(speculations, turn):
                progress.update(bar, description=f"{concurrency} streams: {speculation.value}")
                windows.append(await generator.run(window_settings, speculation, (turn + 1) * TASKS_PER_TURN))
                progress.advance(bar)
            turns.append(windows)
        rows += summarize(concurrency, turns)
    return rows


@asynccontextmanager
async def _services(settings: ServeSettings, pair: ModelPair) -> AsyncIterator[tuple[str, str | None]]:
    """Addresses of the gateway and, if known, of the verifier: those given, or of services started here."""
    if settings.gateway:
        yield settings.gateway, settings.verifier or None
        return
    # What more there is to do than capacity must wait, or be refused: only then are those accepted served as before.
    most_requests = _MOST_REQUESTS if settings.overload_s is None else max(settings.concurrencies)
    gateway_flags = ("--max-concurrent-requests", str(most_requests))
    flags = {GATEWAY: gateway_flags, VERIFIER: _ENGINE_FLAGS, DRAFTER: _ENGINE_FLAGS}
    async with start_services(pair, flags) as stack:
        yield stack.gateway_address, stack.verifier.address


def serve_section(name: str, report: Mapping[str, Any]) -> str:
    pair, settings = report["pair"], report["settings"]
    arrivals = "closed loop" if settings["rate"] is None else f"Poisson arrivals, {settings['rate']:g} a second"
    lines = [
        f"## Many streams: the {pair['name']} pair ({name})\n",
        *provenance_lines(report),
        f"* {arrivals}, mix {settings['mix']}, seed {settings['seed']}; {settings['num_turns']} windows of "
        f"{settings['window_s']:g} s of each setting, after {settings['settle_s']:g} s\n",
        markdown_table(COLUMNS, report["results"]) + "\n",
    ]
    if report["overload"] is not None:
        lines.append(report["overload"]["verdict"] + "\n")
    return "\n".join(lines)


BENCHMARK = Benchmark("easyspec bench serve", __doc__, ServeSettings, measure)
