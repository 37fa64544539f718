"""What watching a request costs a round: `python -m bench.observation`. Runs anywhere, needs no model."""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable

from easyspec.speculation.parameters import SamplingParameters
from easyspec.telemetry.logs import configure_logging
from easyspec.telemetry.metrics import EngineMetrics, StepReport
from gateway.metrics import GatewayMetrics
from gateway.observation import RequestLog, everyone
from gateway.output import GenerationChunk
from gateway.request import GenerationRequest
from gateway.statistics import RoundTimings

_NUM_REPEATS = 15
_NUM_CALLS = 2000
_CHUNK = GenerationChunk(
    text="four tokens of text",
    token_ids=(1, 2, 3, 4),
    num_accepted=3,
    token_texts=(),
    timings=RoundTimings(1_200_000, 400_000, 700_000, 5_000_000, 4_500_000, 6_500_000, 15, 5, 4, 32, 2),
    completion=None,
)


def _median_us(call: Callable[[], object]) -> float:
    """Microseconds of processor time a call takes: the median of repeated blocks."""
    times: list[float] = []
    for _ in range(_NUM_REPEATS):
        started = time.thread_time()
        for _ in range(_NUM_CALLS):
            call()
        times.append((time.thread_time() - started) / _NUM_CALLS * 1e6)
    return round(statistics.median(times), 2)


def main() -> None:
    """Print the costs as JSON."""
    configure_logging("bench", "json", io.StringIO())
    metrics = GatewayMetrics()
    request = everyone(metrics, RequestLog)(GenerationRequest("prompt", SamplingParameters(0)), "model")
    request.started(10, 1000)
    engine = EngineMetrics("verifier")
    report = StepReport("verify", 5_000_000, 32, 2)
    costs = {
        "gateway, a round (us)": _median_us(lambda: request.round(_CHUNK)),
        "engine, a pass (us)": _median_us(lambda: engine.step(report)),
        "gateway, a scrape (us)": _median_us_few(metrics.render),
    }
    print(json.dumps(costs, indent=1))


def _median_us_few(call: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(_NUM_REPEATS):
        started = time.thread_time()
        call()
        times.append((time.thread_time() - started) * 1e6)
    return round(statistics.median(times), 0)


if __name__ == "__main__":
    main()
