"""`easyspec bench targets`: two base models behind one drafter at the same time, plain and drafted side by side."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.decode import write_report
from bench.machine import REPOSITORY
from bench.pairs import PAIRS
from bench.provenance import provenance
from bench.serve import rotated
from bench.serving.clients import LoadClient, VerifierProbe
from bench.serving.load import LoadGenerator, Window, WindowSettings
from bench.serving.summary import summarize, throughput
from bench.serving.workload import MIXES, Speculation, Workload
from bench.tables import print_target_results
from easyspec.cli.processes import DEFAULT_BASE, DRAFTER, GATEWAY, VERIFIER, ServiceStack, StackSettings
from easyspec.cli.signals import run_until_signal
from easyspec.errors import ConfigurationError

SECOND = "base-small"
SECOND_BASES = {"bundled": DEFAULT_BASE.with_name(SECOND), "bench": REPOSITORY / ".bench" / SECOND}
# Tasks of one turn are not those of another, but the same for all settings of a turn.
_TASKS_PER_TURN = 10_000
_ENGINE_FLAGS = ("--num-kv-slots", "32768")
_GATEWAY_FLAGS = ("--draft-deadline-ms", "60000")


@dataclass(frozen=True)
class TargetSettings:
    """One run: `num_turns` times one window of each setting, in rotating order, all models at the same time with
    `num_streams` streams each."""

    speculations: tuple[Speculation, ...]
    num_streams: int
    num_turns: int
    window_s: float
    settle_s: float
    max_ramp_s: float
    mix: str
    seed: int
    timeout_s: float


@dataclass(frozen=True)
class TargetResult:
    """One base model under one setting, while the others were under the same.

    `vs_plain` is the median of per-turn ratios to `off`. Of every task that `off` was given in the same turn, as many
    tokens as both came to are compared; `num_differing` counts the tasks in which some differed.
    """

    model: str
    num_layers: int
    speculation: str
    tokens_per_s: float
    tokens_per_s_by_turn: tuple[float, ...]
    vs_plain: float | None
    vs_plain_by_turn: tuple[float, ...]
    mean_acceptance_length: float | None
    draft_share: float
    num_compared_tokens: int
    num_differing: int
    num_failed: int


def main(argv: list[str]) -> int:
    """Run the benchmark; returns 0, or 1 if a request failed or a token differed, or 128 + a signal's number.

    Raises EasyspecError if the services do not come up.
    """
    arguments = _parser().parse_args(argv)
    console = Console(file=sys.stderr)
    reports: list[dict[str, Any]] = []

    async def run() -> None:
        reports.append(await _run(arguments, console))

    interrupted = run_until_signal(run())
    if interrupted:
        return interrupted
    content = {"command": shlex.join(["easyspec", "bench", "targets", *argv]), **reports[0]}
    print_target_results(content["results"], console)
    if arguments.json is not None:
        write_report(arguments.json, content)
        console.print(f"written to {arguments.json}")
    num_bad = sum(row["num_failed"] + row["num_differing"] for row in content["results"])
    if num_bad:
        console.print(f"{num_bad} requests failed or said something else than plain decoding")
    return 1 if num_bad else 0


async def measure(
    clients: Sequence[LoadClient], settings: TargetSettings, progress: Progress
) -> list[list[dict[Speculation, Window]]]:
    """For each model, by turn, the windows of each setting; those of all models were measured at the same time."""
    workload = Workload(settings.mix, settings.seed)
    generators = [LoadGenerator(client, VerifierProbe(None), workload) for client in clients]
    window_settings = WindowSettings(settings.num_streams, settings.window_s, settings.max_ramp_s)

    async def at_once(wanted: WindowSettings, speculation: Speculation, first_index: int) -> list[Window]:
        together = asyncio.Barrier(len(generators))
        runs = (generator.run(wanted, speculation, first_index, together) for generator in generators)
        return list(await asyncio.gather(*runs))

    bar = progress.add_task("settling", total=1 + settings.num_turns * len(settings.speculations))
    await at_once(dataclasses.replace(window_settings, window_s=settings.settle_s), Speculation.ON, 0)
    progress.advance(bar)
    turns: list[list[dict[Speculation, Window]]] = [[] for _ in generators]
    for turn in range(settings.num_turns):
        for windows_of in turns:
            windows_of.append({})
        for speculation in rotated(settings.speculations, turn):
            progress.update(bar, description=speculation.value)
            windows = await at_once(window_settings, speculation, (turn + 1) * _TASKS_PER_TURN)
            for windows_of, window in zip(turns, windows, strict=True):
                windows_of[-1][speculation] = window
            progress.advance(bar)
    return turns


def results_of(
    model: str, num_layers: int, num_streams: int, turns: Sequence[dict[Speculation, Window]]
) -> list[TargetResult]:
    """One row per setting of one model."""
    rows: list[TargetResult] = []
    for found in summarize(num_streams, [list(turn.values()) for turn in turns]):
        speculation = Speculation(found.speculation)
        is_plain = speculation is Speculation.OFF
        ratios = [] if is_plain else [_ratio(turn[speculation], turn[Speculation.OFF]) for turn in turns]
        compared = [] if is_plain else [_compare(turn[Speculation.OFF], turn[speculation]) for turn in turns]
        rows.append(
            TargetResult(
                model,
                num_layers,
                found.speculation,
                found.tokens_per_s,
                found.tokens_per_s_by_window,
                statistics.median(ratios) if ratios else None,
                tuple(ratios),
                found.mean_acceptance_length,
                found.draft_share,
                sum(num_tokens for num_tokens, _ in compared),
                sum(num_differing for _, num_differing in compared),
                found.num_failed,
            )
        )
    return rows


def _ratio(window: Window, plain: Window) -> float:
    return throughput(window) / max(throughput(plain), 1e-9)


def _compare(plain: Window, drafted: Window) -> tuple[int, int]:
    """Over the tasks that both windows began: tokens compared, and tasks in which some of them differ."""
    said = {stream.index: stream.token_ids for stream in plain.streams}
    num_tokens = num_differing = 0
    for stream in drafted.streams:
        length = min(len(stream.token_ids), len(said.get(stream.index, [])))
        num_tokens += length
        num_differing += stream.token_ids[:length] != said.get(stream.index, [])[:length]
    return num_tokens, num_differing


async def _run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    settings = _settings(arguments)
    stack_settings = _stack_settings(arguments.pair)
    async with AsyncExitStack() as exits:
        stack = await exits.enter_async_context(ServiceStack(stack_settings, on_log=lambda role, line: None))
        address = stack.gateway_address
        info = await (await exits.enter_async_context(LoadClient(address, settings.timeout_s))).info()
        models = [served.base_model for served in info.served_models]
        clients = [
            await exits.enter_async_context(LoadClient(address, settings.timeout_s, model.name)) for model in models
        ]
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            turns = await measure(clients, settings, progress)
    results = [
        dataclasses.asdict(result)
        for model, turns_of in zip(models, turns, strict=True)
        for result in results_of(model.name, model.num_layers, settings.num_streams, turns_of)
    ]
    return {
        **provenance([*PAIRS[arguments.pair].checkpoints, SECOND_BASES[arguments.pair]]),
        "pair": arguments.pair,
        "settings": {
            **dataclasses.asdict(settings),
            "speculations": [speculation.value for speculation in settings.speculations],
        },
        "results": results,
    }


def _stack_settings(pair_name: str) -> StackSettings:
    pair = PAIRS[pair_name]
    pair.check()
    second = SECOND_BASES[pair_name]
    if not (second / "config.json").is_file():
        raise ConfigurationError(f"no checkpoint in {str(second)!r}; make it with `make bench-pair`")
    flags = {GATEWAY: _GATEWAY_FLAGS, VERIFIER: _ENGINE_FLAGS, DRAFTER: _ENGINE_FLAGS}
    return StackSettings(base=pair.base, draft=pair.draft, also={SECOND: second}, flags=flags)


def _settings(arguments: argparse.Namespace) -> TargetSettings:
    wanted = [Speculation(name) for name in arguments.speculation]
    return TargetSettings(
        speculations=(Speculation.OFF, *(setting for setting in wanted if setting is not Speculation.OFF)),
        num_streams=arguments.streams,
        num_turns=arguments.turns,
        window_s=arguments.window_s,
        settle_s=arguments.settle_s,
        max_ramp_s=10.0,
        mix=arguments.mix,
        seed=arguments.seed,
        timeout_s=arguments.timeout_s,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyspec bench targets", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write results to FILE")
    add("--pair", choices=sorted(SECOND_BASES), default="bundled", help="models to start (bench: widened ones)")
    add("--streams", type=int, default=1, metavar="N", help="streams of each model at a time (default: 1)")
    add("--speculation", choices=["on", "auto"], nargs="+", default=["on"], help="beside off (default: on)")
    add("--turns", type=int, default=6, metavar="N", help="windows of each setting (default: 6)")
    add("--window-s", type=float, default=6.0, metavar="S", help="seconds a window is measured (default: 6)")
    add("--settle-s", type=float, default=6.0, metavar="S", help="seconds of load before the first (default: 6)")
    add("--mix", choices=sorted(MIXES), default="mixed", help="prompts and lengths (default: mixed)")
    add("--timeout-s", type=float, default=120.0, metavar="S", help="deadline of a request (default: 120)")
    add("--seed", type=int, default=7, metavar="N", help="chooses prompts, lengths and noise (default: 7)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
