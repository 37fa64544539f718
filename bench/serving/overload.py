"""More load than there is capacity: accepted requests are served right, others are refused in time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.progress import Progress

from bench.harness.clients import GatewayClient
from bench.harness.streams import Outcome, Speculation, Stream
from bench.harness.tables import Row
from bench.serving.summary import inter_token_s, percentiles
from bench.serving.workload import Workload
from easyspec.errors import EasyspecError

# Distinct requests; their outputs are known from having been asked for one at a time.
_NUM_TASKS = 16
_PROBE_INTERVAL_S = 0.25
_RECOVERED_FACTOR = 2.0
_RECOVERY_SLACK_S = 0.1
MAX_RECOVERY_S = 5.0


@dataclass(frozen=True)
class OverloadSettings:
    """`factor` times the capacity measured in `calibration_s` seconds of a closed loop of `concurrency` clients is
    offered for `duration_s` seconds. The p99 between two tokens may be `max_slowdown` times that at capacity."""

    duration_s: float
    concurrency: int
    factor: float = 3.0
    calibration_s: float = 8.0
    max_slowdown: float = 2.0


async def run_overload(
    client: GatewayClient, workload: Workload, settings: OverloadSettings, progress: Progress
) -> Row:
    """Learn the right answers and the capacity, overload, then watch the recovery."""
    bar = progress.add_task("learning the answers", total=3)
    expected, baseline_s = await _learn_answers(client, workload)
    progress.update(bar, description="measuring the capacity", advance=1)
    capacity_per_s, at_capacity = await _capacity(client, workload, settings)
    rate = settings.factor * capacity_per_s
    progress.update(bar, description=f"offering {rate:.1f} requests/s", advance=1)
    # Poisson arrivals that do not wait for answers; the group ends with the last answer.
    chooser = random.Random(1)
    streams: list[Stream] = []
    end_s = time.perf_counter() + settings.duration_s
    async with asyncio.TaskGroup() as group:
        while time.perf_counter() < end_s:
            await asyncio.sleep(chooser.expovariate(rate))
            stream = _stream(workload, len(streams))
            streams.append(stream)
            group.create_task(client.run(stream))
    progress.update(bar, description="recovering", advance=1)
    recovery_s = await _recovery(client, workload, baseline_s)
    return overload_report(settings, capacity_per_s, at_capacity, streams, expected, baseline_s, recovery_s)


def _stream(workload: Workload, index: int) -> Stream:
    return Stream(workload.task(index % _NUM_TASKS, Speculation.AUTO), index)


async def _learn_answers(client: GatewayClient, workload: Workload) -> tuple[list[list[int]], float]:
    """The tokens of every distinct request when it is alone, and the seconds the first of them took the second time."""
    streams = [_stream(workload, index) for index in [*range(_NUM_TASKS), 0]]
    for stream in streams:
        await client.run(stream)
    return [stream.token_ids for stream in streams[:_NUM_TASKS]], streams[-1].ended_s - streams[-1].started_s


async def _capacity(
    client: GatewayClient, workload: Workload, settings: OverloadSettings
) -> tuple[float, Sequence[Stream]]:
    """Requests per second that a closed loop completes, and their streams."""
    done: list[Stream] = []

    async def worker(first: int) -> None:
        for index in range(first, first + 1_000_000):
            stream = _stream(workload, index)
            await client.run(stream)
            done.append(stream)

    started_s = time.perf_counter()
    workers = [asyncio.ensure_future(worker(index)) for index in range(settings.concurrency)]
    try:
        await asyncio.sleep(settings.calibration_s)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    num_complete = sum(stream.outcome is Outcome.COMPLETE for stream in done)
    if not num_complete:
        raise EasyspecError(f"no request was completed in {settings.calibration_s:g} s of calibration")
    return num_complete / (time.perf_counter() - started_s), done


async def _recovery(client: GatewayClient, workload: Workload, baseline_s: float) -> float | None:
    """Seconds until a lone request is as quick as before; None if it is not within twice the time allowed."""
    started_s = time.perf_counter()
    while (now_s := time.perf_counter()) - started_s < 2 * MAX_RECOVERY_S:
        stream = _stream(workload, 0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(MAX_RECOVERY_S):
                await client.run(stream)
        took_s = stream.ended_s - stream.started_s
        if stream.outcome is Outcome.COMPLETE and took_s <= _RECOVERED_FACTOR * baseline_s + _RECOVERY_SLACK_S:
            return now_s - started_s
        await asyncio.sleep(_PROBE_INTERVAL_S)
    return None


def overload_report(
    settings: OverloadSettings,
    capacity_per_s: float,
    at_capacity: Sequence[Stream],
    streams: Sequence[Stream],
    expected: Sequence[Sequence[int]],
    baseline_s: float,
    recovery_s: float | None,
) -> Row:
    """Judge what became of `streams`; `expected` are the tokens of each distinct request, times are in seconds.

    `recovery_s` is when, after the load, a lone request was as quick as before it; `slowdown` is the p99 of the time
    between two tokens of those accepted over that at capacity.
    """
    complete = [stream for stream in streams if stream.outcome is Outcome.COMPLETE]
    refused = [stream for stream in streams if stream.outcome is Outcome.REFUSED]
    wrong = [stream for stream in complete if stream.token_ids != expected[stream.index % _NUM_TASKS]]
    hintless = [stream for stream in refused if not stream.retry_after_s]
    num_failed = len(streams) - len(complete) - len(refused)
    is_recovered = recovery_s is not None and recovery_s <= MAX_RECOVERY_S
    capacity_gaps, gaps = percentiles([*inter_token_s(at_capacity)]), percentiles([*inter_token_s(complete)])
    slowdown = gaps["p99"] / capacity_gaps["p99"] if gaps is not None and capacity_gaps is not None else None
    is_quick = slowdown is None or slowdown <= settings.max_slowdown  # unknown where each answer came in one message
    is_passed = bool(complete) and not wrong and not hintless and num_failed == 0 and is_recovered and is_quick
    recovered = f"recovered after {recovery_s:.1f} s" if recovery_s is not None else "did not recover"
    return {
        "capacity_per_s": capacity_per_s,
        "offered_per_s": settings.factor * capacity_per_s,
        "duration_s": settings.duration_s,
        "num_offered": len(streams),
        "num_complete": len(complete),
        "num_wrong": len(wrong),
        "num_refused": len(refused),
        "num_refused_without_hint": len(hintless),
        "num_failed": num_failed,
        "complete_ms": percentiles([stream.ended_s - stream.started_s for stream in complete]),
        "refused_ms": percentiles([stream.ended_s - stream.started_s for stream in refused]),
        "capacity_inter_token_ms": capacity_gaps,
        "inter_token_ms": gaps,
        "slowdown": slowdown,
        "baseline_ms": baseline_s * 1e3,
        "recovery_s": recovery_s,
        "is_passed": is_passed,
        "verdict": f"overload {'passed' if is_passed else 'FAILED'}: of {len(streams)} requests {len(complete)} were "
        f"served ({len(wrong)} wrong), {len(refused)} refused ({len(hintless)} without retry-after), "
        f"{num_failed} failed; {recovered}; p99 between tokens "
        + (f"{slowdown:.2f} times that at capacity" if slowdown is not None else "not known"),
    }
