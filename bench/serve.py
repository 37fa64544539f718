"""`easyspec bench serve`: many streams at once, speculation off, on and auto side by side."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.decode import write_report
from bench.pair_prompts import HELD_OUT_TEXT, PairPrompts
from bench.pairs import PAIR_HELP, PAIRS, ModelPair
from bench.provenance import provenance
from bench.serving.clients import LoadClient, VerifierProbe
from bench.serving.load import LoadGenerator, Window, WindowSettings
from bench.serving.overload import OverloadReport, OverloadSettings, run_overload
from bench.serving.summary import ServeResult, summarize
from bench.serving.workload import MIXES, Speculation, Workload
from bench.tables import print_serve_results
from easyspec.cli.processes import DRAFTER, GATEWAY, VERIFIER, ServiceStack
from easyspec.cli.signals import run_until_signal
from easyspec.errors import ConfigurationError

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
# Tasks of one window are not those of another, but the same for all settings of a turn.
_TASKS_PER_TURN = 10_000
# Room for the largest concurrency with the longest prompts of the mixes.
_ENGINE_FLAGS = ("--num-kv-slots", "98304")
_GATEWAY_FLAGS = ("--draft-deadline-ms", "60000")
_MOST_REQUESTS = 64


@dataclass(frozen=True)
class ServeSettings:
    """One run. `settle_s` of unmeasured load in auto precede each concurrency; then `num_turns` times one window of
    each setting, in rotating order."""

    concurrencies: tuple[int, ...]
    speculations: tuple[Speculation, ...]
    num_turns: int
    window_s: float
    max_ramp_s: float
    settle_s: float
    mix: str
    seed: int
    rate: float | None
    timeout_s: float


def main(argv: list[str]) -> int:
    """Run the benchmark; returns 0, or 1 if requests failed, or 128 + a signal's number.

    Raises EasyspecError if the services do not come up, or the gateway does not answer.
    """
    arguments = _parser().parse_args(argv)
    console = Console(file=sys.stderr)
    reports: list[dict[str, Any]] = []

    async def run() -> None:
        reports.append(await _run(arguments, console))

    interrupted = run_until_signal(run())
    if interrupted:
        return interrupted
    content = {"command": shlex.join(["easyspec", "bench", "serve", *argv]), **reports[0]}
    print_serve_results(content["results"], console)
    if arguments.json is not None:
        write_report(arguments.json, content)
        console.print(f"written to {arguments.json}")
    if arguments.plot is not None:
        from bench.serving.plot import write_plot  # brings matplotlib along, which only this needs

        write_plot(content["results"], arguments.plot)
        console.print(f"written to {arguments.plot}")
    num_failed = sum(row["num_failed"] for row in content["results"])
    if num_failed:
        console.print(f"{num_failed} requests failed")
    overload = content["overload"]
    if overload is not None:
        console.print(overload["verdict"])
    return 1 if num_failed or (overload is not None and not overload["is_passed"]) else 0


async def measure(
    client: LoadClient,
    probe: VerifierProbe,
    settings: ServeSettings,
    progress: Progress,
    source: PairPrompts = HELD_OUT_TEXT,
) -> list[ServeResult]:
    """All concurrencies one after the other, their settings interleaved."""
    generator = LoadGenerator(client, probe, Workload(settings.mix, settings.seed, source))
    num_windows = 1 + settings.num_turns * len(settings.speculations)
    bar = progress.add_task("starting", total=len(settings.concurrencies) * num_windows)
    results: list[ServeResult] = []
    for concurrency in settings.concurrencies:
        window_settings = WindowSettings(concurrency, settings.window_s, settings.max_ramp_s, settings.rate)
        progress.update(bar, description=f"{concurrency} streams: settling")
        settling = dataclasses.replace(window_settings, window_s=settings.settle_s)
        await generator.run(settling, Speculation.AUTO, 0)
        progress.advance(bar)
        turns: list[list[Window]] = []
        for turn in range(settings.num_turns):
            windows = []
            for speculation in rotated(settings.speculations, turn):
                progress.update(bar, description=f"{concurrency} streams: {speculation.value}")
                windows.append(await generator.run(window_settings, speculation, (turn + 1) * _TASKS_PER_TURN))
                progress.advance(bar)
            turns.append(windows)
        results += summarize(concurrency, turns)
    return results


def rotated(settings: Sequence[Speculation], turn: int) -> list[Speculation]:
    """The settings in the order of a turn: each is first, second and last equally often."""
    shift = turn % len(settings)
    return [*settings[shift:], *settings[:shift]]


async def _run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    settings = _settings(arguments)
    pair = PAIRS[arguments.pair]
    async with AsyncExitStack() as stack:
        gateway, verifier = await stack.enter_async_context(_services(arguments, pair))
        client = await stack.enter_async_context(LoadClient(gateway, settings.timeout_s))
        probe = await stack.enter_async_context(VerifierProbe(verifier))
        info = await client.info()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        overload: OverloadReport | None = None
        results: list[ServeResult] = []
        with Progress(*columns, console=console) as progress:
            if arguments.overload_s is None:
                results = await measure(client, probe, settings, progress, pair.prompts)
            else:
                wanted = OverloadSettings(arguments.overload_s, concurrency=max(settings.concurrencies))
                overload = await run_overload(
                    client, Workload(settings.mix, settings.seed, pair.prompts), wanted, progress
                )
    return {
        **provenance(pair.checkpoints if arguments.gateway is None else []),
        "pair": {"name": pair.name if arguments.gateway is None else arguments.gateway, **_models(info)},
        "settings": {
            **dataclasses.asdict(settings),
            "speculations": [speculation.value for speculation in settings.speculations],
        },
        "results": [dataclasses.asdict(result) for result in results],
        "overload": dataclasses.asdict(overload) if overload is not None else None,
    }


def _models(info: Any) -> dict[str, str]:
    return {
        "base": info.models[0].name if info.models else "",
        "draft": info.draft_model.name if info.HasField("draft_model") else "",
    }


@asynccontextmanager
async def _services(arguments: argparse.Namespace, pair: ModelPair) -> AsyncIterator[tuple[str, str | None]]:
    """Addresses of the gateway and, if known, of the verifier: those given, or of services started here."""
    if arguments.gateway is not None:
        yield arguments.gateway, arguments.verifier
        return
    pair.check()
    # What more there is to do than capacity must wait, or be refused: only then are those accepted served as before.
    most_requests = _MOST_REQUESTS if arguments.overload_s is None else max(_settings(arguments).concurrencies)
    gateway_flags = (*_GATEWAY_FLAGS, "--max-concurrent-requests", str(most_requests))
    flags = {GATEWAY: gateway_flags, VERIFIER: _ENGINE_FLAGS, DRAFTER: _ENGINE_FLAGS}
    async with ServiceStack(pair.settings(flags), on_log=lambda role, line: None) as stack:
        yield stack.gateway_address, stack.verifier.address


def _settings(arguments: argparse.Namespace) -> ServeSettings:
    quick = arguments.quick
    settings = ServeSettings(
        concurrencies=tuple(arguments.concurrency or CONCURRENCIES),
        speculations=tuple(Speculation(name) for name in arguments.speculation or [item.value for item in Speculation]),
        num_turns=arguments.turns or (2 if quick else 6),
        window_s=arguments.window_s or (3.0 if quick else 6.0),
        max_ramp_s=2.0 if quick else 10.0,
        settle_s=arguments.settle_s if arguments.settle_s is not None else (4.0 if quick else 15.0),
        mix=arguments.mix,
        seed=arguments.seed,
        rate=arguments.rate,
        timeout_s=arguments.timeout_s,
    )
    if settings.rate is not None and settings.rate <= 0:
        raise ConfigurationError(f"--rate is {settings.rate:g}; allowed: above 0")
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyspec bench serve", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write results to FILE")
    add("--plot", type=Path, metavar="FILE", help="draw throughput and latencies to FILE (PNG; needs the extra bench)")
    add("--gateway", metavar="ADDRESS", help="host:port of a running gateway (default: start services on --pair)")
    add("--verifier", metavar="ADDRESS", help="host:port of its verifier, which is asked how full its KV pool is")
    add("--pair", choices=sorted(PAIRS), default="bundled", help=PAIR_HELP)
    add("--quick", action="store_true", help="few short windows, done within 5 minutes")
    add("--concurrency", type=_positive, nargs="+", metavar="N", help="streams at a time (default: 1 2 4 8 16 32 64)")
    add("--speculation", choices=[item.value for item in Speculation], nargs="+", help="(default: off on auto)")
    add("--rate", type=float, metavar="R", help="Poisson arrivals a second, instead of a closed loop")
    add("--mix", choices=sorted(MIXES), default="mixed", help="prompts and lengths (default: mixed)")
    add("--turns", type=_positive, metavar="N", help="windows of each setting (default: 6, quick 2)")
    add("--window-s", type=float, metavar="S", help="seconds a window is measured (default: 6, quick 3)")
    add("--settle-s", type=float, metavar="S", help="auto before each concurrency (default: 15, quick 4)")
    add("--timeout-s", type=float, default=120.0, metavar="S", help="deadline of a request (default: 120)")
    add("--overload-s", type=float, metavar="S", help="instead of all that: offer 3 x capacity for S seconds")
    add("--seed", type=int, default=7, metavar="N", help="chooses prompts, lengths and noise (default: 7)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
