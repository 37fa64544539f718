"""`python -m bench observation`: what watching a request costs a round. Runs anywhere, needs no model."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from easyspec.speculation.parameters import SamplingParameters
from easyspec.telemetry.logs import configure_logging
from easyspec.telemetry.metrics import EngineMetrics, StepReport
from gateway.request import GenerationRequest
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.observation import RequestLog, all_observers
from gateway.telemetry.statistics import RoundTimings
from gateway.text.output import GenerationChunk

_NUM_REPEATS = 15
_CHUNK = GenerationChunk(
    text="four tokens of text",
    token_ids=(1, 2, 3, 4),
    num_accepted=3,
    token_texts=(),
    timings=RoundTimings(1_200_000, 400_000, 700_000, 5_000_000, 4_500_000, 6_500_000, 15, 5, 4, 32, 2),
    completion=None,
)


@dataclass(frozen=True)
class ObservationSettings:
    """One run."""

    num_calls: Annotated[int, flag("Calls of a block; the median of 15 blocks is printed.", minimum=1)] = 2000


def _median_us(call: Callable[[], object], num_calls: int) -> float:
    """Microseconds of processor time a call takes: the median of repeated blocks."""
    times: list[float] = []
    for _ in range(_NUM_REPEATS):
        started = time.thread_time()
        for _ in range(num_calls):
            call()
        times.append((time.thread_time() - started) / num_calls * 1e6)
    return round(statistics.median(times), 2)


def measure(settings: ObservationSettings, console: Console) -> Findings:
    """Microseconds of a round at the gateway, a pass at an engine, and a scrape."""
    configure_logging("bench", "json", io.StringIO())
    metrics = GatewayMetrics()
    request = all_observers(metrics, RequestLog)(GenerationRequest("prompt", SamplingParameters(0)), "model")
    request.started(10, 1000)
    engine = EngineMetrics("verifier")
    report = StepReport("verify", 5_000_000, 32, 2)
    return Findings(
        {
            "gateway, a round (us)": _median_us(lambda: request.round(_CHUNK), settings.num_calls),
            "engine, a pass (us)": _median_us(lambda: engine.step(report), settings.num_calls),
            "gateway, a scrape (us)": _median_us(metrics.render, 1),
        }
    )


BENCHMARK = Benchmark("python -m bench observation", __doc__, ObservationSettings, measure)
