"""`python -m bench.ahead`: drafting ahead against taking turns, each role on a core of its own, and both on all cores.

One stream. Every prompt is completed with and without (`speculation.draft_ahead`), in turns, for every number of
guesses. The drafter's own trial, which turns drafting ahead off where rounds do not get faster by it, is at work.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bench.clients import GatewayClient, Task
from bench.measurement import Mode, Sample
from bench.pairs import PAIRS, ModelPair
from bench.recording import print_provenance
from bench.source_tasks import TASK_NAMES, source_tasks
from easyspec.cli.processes import DRAFTER, GATEWAY, VERIFIER, ServiceProcess, ServiceStack, StackSettings
from easyspec.speculation.parameters import LayerPlanRequest, TreeBudget
from easyspec.speculation.sources import DraftSources

_BUDGET = TreeBudget(num_levels=5, width=4, num_nodes=16)
_MODE = Mode("model", LayerPlanRequest(), DraftSources.MODEL)
_WARM_UP_TOKENS = 24
_Samples = dict[tuple[float, bool], list[Sample]]


async def measure(pair: ModelPair, num_guesses: int, arguments: argparse.Namespace, *, own_cores: bool) -> _Samples:
    """Completions by temperature, and whether they drafted ahead."""
    one_thread = ("--num-threads", "1") if own_cores else ()
    flags = {
        GATEWAY: ("--draft-deadline-ms", "60000"),
        VERIFIER: one_thread,
        DRAFTER: (*one_thread, "--draft-ahead", str(num_guesses)),
    }
    settings = StackSettings(base=pair.base, draft=pair.draft, flags=flags)
    samples: _Samples = defaultdict(list)
    tasks = [task for name in TASK_NAMES for task in source_tasks(name, arguments.num_prompts, arguments.seed)]
    async with (
        ServiceStack(settings, on_log=lambda role, line: None) as stack,
        GatewayClient(stack.gateway_address, timeout_s=600.0) as client,
    ):
        for index, process in enumerate(stack.processes):
            _place(process, {index % 2} if own_cores else None, arguments.realtime)
        for index, task in enumerate([tasks[0], *tasks]):
            is_warm_up = index == 0
            num_tokens = _WARM_UP_TOKENS if is_warm_up else arguments.max_tokens
            for temperature in arguments.temperature:
                for is_ahead in (True, False) if index % 2 else (False, True):
                    asked = Task(index, task.prompt, _MODE, temperature, index, num_tokens, _BUDGET, is_ahead)
                    sample = await client.complete(asked)
                    if not is_warm_up:
                        samples[temperature, is_ahead].append(sample)
    return samples


def _place(process: ServiceProcess, cores: set[int] | None, realtime: int) -> None:
    """Put every thread of a process on `cores`, and at a real-time priority if it is above 0."""
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        if cores is not None:
            os.sched_setaffinity(int(thread.name), cores)
        if realtime:
            os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, os.sched_param(realtime))


def _median_speed(samples: Sequence[Sample]) -> float:
    """Tokens a second by the gateway's clock, over all rounds but the first; messages may reach a client in bunches."""
    rounds = [sample.decode_rounds for sample in samples]
    return statistics.median(1e9 * sum(r.num_tokens for r in each) / sum(r.round_ns for r in each) for each in rounds)


def main(argv: Sequence[str]) -> int:
    """Print a table; returns 1 if a completion differs by drafting ahead."""
    arguments = _parser().parse_args(argv)
    pair = PAIRS[arguments.pair]
    pair.check()
    print_provenance("bench.ahead", argv)
    print("| cores | guesses | T | tokens/s, turns | tokens/s, ahead | ratio of medians | hits |")
    print("|---|---|---|---|---|---|---|")
    num_differing = 0
    for own_cores in (True, False):
        for num_guesses in arguments.guesses:
            samples = asyncio.run(measure(pair, num_guesses, arguments, own_cores=own_cores))
            for temperature in arguments.temperature:
                turns, ahead = samples[temperature, False], samples[temperature, True]
                num_differing += sum(a.token_ids != b.token_ids for a, b in zip(turns, ahead, strict=True))
                before, after = (
                    statistics.median(sample.tokens_per_s or 0.0 for sample in each) for each in (turns, ahead)
                )
                hits = sum(sample.num_ahead_hits for sample in ahead)
                tried = hits + sum(sample.num_ahead_misses for sample in ahead)
                place = "one each" if own_cores else "all"
                rate = f"{hits / tried:.0%} of {tried}" if tried else "-"
                row = (place, num_guesses, temperature, f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}", rate)
                print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print(f"\n{num_differing} completions differ (expected 0)")
    return 1 if num_differing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.ahead", description=__doc__)
    add = parser.add_argument
    add("--pair", choices=sorted(PAIRS), default="bundled", help="models to measure")
    add("--guesses", type=int, nargs="+", default=[1, 3, 6], help="verdicts guessed a round (default: 1 3 6)")
    add("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    add("--num-prompts", type=int, default=3, help="of each kind (default: 3)")
    add("--max-tokens", type=int, default=96)
    add("--seed", type=int, default=7)
    add("--realtime", type=int, default=0, help="real-time priority of the services; 0: none (needs the right to)")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
