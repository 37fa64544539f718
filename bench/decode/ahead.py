"""`python -m bench ahead`: drafting ahead against taking turns, each role on a core of its own, and both on all cores.

One stream. Every prompt is completed with and without (`speculation.draft_ahead`), in turns, for every number of
guesses. The drafter's own trial, which turns drafting ahead off where rounds do not get faster by it, is at work.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console

from bench.decode.samples import Mode, Planned, Sample, complete_each
from bench.harness.benchmark import Benchmark, Findings
from bench.harness.clients import GatewayClient
from bench.harness.flags import flag
from bench.harness.pairs import PAIR, PAIRS, start_services
from bench.harness.tables import Column, ResultTable
from bench.harness.tasks import TASK_NAMES, source_prompts
from bench.harness.turns import progress_on
from easyspec.cli.processes import DRAFTER, VERIFIER
from easyspec.speculation.parameters import LayerPlanRequest, TreeBudget

_BUDGET = TreeBudget(num_levels=5, width=4, num_nodes=16)
_MODE = Mode("model", LayerPlanRequest())
_COLUMNS = (
    Column("cores", "cores"),
    Column("guesses", "num_guesses"),
    Column("T", "temperature", "g"),
    Column("tokens/s, turns", "turns_tokens_per_s", ".1f"),
    Column("tokens/s, ahead", "ahead_tokens_per_s", ".1f"),
    Column("ratio of medians", lambda row: row["ahead_tokens_per_s"] / row["turns_tokens_per_s"], ".2f"),
    Column("hits", lambda row: f"{row['num_hits'] / max(1, row['num_tried']):.0%} of {row['num_tried']}"),
)


@dataclass(frozen=True)
class AheadSettings:
    pair: Annotated[str, PAIR] = "bundled"
    guesses: Annotated[tuple[int, ...], flag("Verdicts guessed a round.")] = (1, 3, 6)
    temperatures: Annotated[tuple[float, ...], flag("One or several.", "--temperature")] = (0.0, 0.8)
    num_prompts: Annotated[int, flag("Prompts of each kind.", minimum=1)] = 3
    max_tokens: Annotated[int, flag("Tokens per completion.", minimum=1)] = 96
    seed: Annotated[int, flag("Chooses prompts and noise.")] = 7
    realtime: Annotated[int, flag("Real-time priority of the services (needs the right to); 0 is none.")] = 0


async def measure(settings: AheadSettings, console: Console) -> Findings:
    """One row a placement, number of guesses and temperature; fails if a completion differs by drafting ahead."""
    rows: list[dict[str, Any]] = []
    num_differing = 0
    for own_cores in (True, False):
        for num_guesses in settings.guesses:
            samples = await _complete_all(settings, num_guesses, console, own_cores=own_cores)
            for temperature in settings.temperatures:
                turns, ahead = samples[temperature, False], samples[temperature, True]
                num_differing += sum(a.token_ids != b.token_ids for a, b in zip(turns, ahead, strict=True))
                num_hits = sum(sample.counts.num_ahead_hits for sample in ahead)
                rows.append(
                    {
                        "cores": "one each" if own_cores else "all",
                        "num_guesses": num_guesses,
                        "temperature": temperature,
                        "turns_tokens_per_s": _median_speed(turns),
                        "ahead_tokens_per_s": _median_speed(ahead),
                        "num_hits": num_hits,
                        "num_tried": num_hits + sum(sample.counts.num_ahead_misses for sample in ahead),
                    }
                )
    return Findings(
        content={"results": rows, "num_differing": num_differing},
        tables=[ResultTable("drafting ahead, medians over completions", _COLUMNS, rows)],
        notes=[f"{num_differing} completions differ (expected 0)"],
        checkpoints=PAIRS[settings.pair].checkpoints,
        exit_code=1 if num_differing else 0,
    )


async def _complete_all(
    settings: AheadSettings, num_guesses: int, console: Console, *, own_cores: bool
) -> dict[tuple[float, bool], list[Sample]]:
    """Completions by temperature, and whether they drafted ahead."""
    one_thread = ("--num-threads", "1") if own_cores else ()
    flags = {VERIFIER: one_thread, DRAFTER: (*one_thread, "--draft-ahead", str(num_guesses))}
    prompts = [prompt for name in TASK_NAMES for prompt in source_prompts(name, settings.num_prompts, settings.seed)]
    planned = [
        Planned(_MODE, index, dataclasses.replace(task, draft_ahead=is_ahead))
        for index, prompt in enumerate(prompts)
        for temperature in settings.temperatures
        for task in [_MODE.task(prompt, settings.max_tokens, temperature, settings.seed + index, _BUDGET)]
        for is_ahead in ((False, True) if index % 2 else (True, False))
    ]
    samples: dict[tuple[float, bool], list[Sample]] = defaultdict(list)
    services = start_services(PAIRS[settings.pair], flags)
    async with services as stack, GatewayClient(stack.gateway_address) as client:
        for index, process in enumerate(stack.processes):
            for thread in map(int, os.listdir(f"/proc/{process.pid}/task")):
                if own_cores:
                    os.sched_setaffinity(thread, {index % 2})
                if settings.realtime:
                    os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(settings.realtime))

        def say(each: Planned) -> str:
            way = "ahead" if each.task.draft_ahead else "turns"
            return f"{num_guesses} guesses, prompt {each.prompt_index + 1}, {way}"

        with progress_on(console) as progress:
            found = await complete_each(client, planned, 2 * len(settings.temperatures), say, progress)
    for each, sample in zip(planned, found, strict=True):
        samples[sample.temperature, each.task.draft_ahead].append(sample)
    return samples


def _median_speed(samples: Sequence[Sample]) -> float:
    return statistics.median(sample.tokens_per_s or 0.0 for sample in samples)


BENCHMARK = Benchmark("python -m bench ahead", __doc__, AheadSettings, measure, is_markdown=True)
