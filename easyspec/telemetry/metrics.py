"""Prometheus metrics of one process: its registry, and what every role measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from easyspec import __version__
from easyspec.speculation.messages import DraftTimings, KvUsage, ModelInfo, VerifyTimings

CONTENT_TYPE = CONTENT_TYPE_LATEST
# From a small model's pass on a GPU to a long prompt on a CPU, in seconds.
STEP_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SESSION_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)

_NS = 1e-9


class RoleMetrics:
    """The registry of one process, and the RPCs it answers. Made once, at the process's edge, and handed down."""

    def __init__(self, role: str) -> None:
        # The second series beside every counter and histogram, which says when it was made, is not needed.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Gauge("easyspec_build_info", "Always 1; the labels tell.", ("role", "version"), registry=self.registry)
        build.labels(role, __version__).set(1)
        self._rpcs = Counter("easyspec_rpcs", "RPCs answered.", ("method", "code"), registry=self.registry)
        self._refusals = Counter(
            "easyspec_refusals",
            "Requests that ended with an error, gRPC and REST alike, by its reason (easyspec/rpc/errors.py).",
            ("reason",),
            registry=self.registry,
        )

    def rpc_finished(self, method: str, code: str) -> None:
        """Count an RPC. `method` is its full name, one of ours; `code` a gRPC status code's name."""
        self._rpcs.labels(method.rpartition("/")[2], code).inc()

    def refused(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


@dataclass(frozen=True)
class StepReport:
    """One step of an engine. `num_rows` are the token rows that were computed for `num_sessions`, `kind` is what for:
    verify, draft or prefill. 0 sessions: not known."""

    kind: str
    duration_ns: int
    num_rows: int
    num_sessions: int


StepObserver = Callable[[StepReport], None]


def ignore_step(_report: StepReport) -> None:
    """The observer of an engine that is not observed."""


class EngineMetrics(RoleMetrics):
    """What a role with a model measures. `read_usage` is asked at every scrape, None while the model is loading."""

    def __init__(self, role: str) -> None:
        super().__init__(role)
        gauge, counter = partial(Gauge, registry=self.registry), partial(Counter, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self._model = gauge(
            "easyspec_model_info",
            "Always 1; the labels tell what an engine computes with, and a drafter's default layer plan.",
            ("model", "executor", "dtype", "weights", "layer_groups"),
        )
        self._step_seconds = histogram(
            "easyspec_engine_step_seconds",
            "Time of one pass of the model; its sum is the time the device was in use.",
            ("kind",),
            buckets=STEP_BUCKETS,
        )
        self._step_rows = histogram(
            "easyspec_engine_step_rows", "Token rows of one pass.", ("kind",), buckets=ROW_BUCKETS
        )
        self._step_sessions = histogram(
            "easyspec_engine_step_sessions", "Sessions of one pass.", ("kind",), buckets=SESSION_BUCKETS
        )
        self._queue_seconds = histogram(
            "easyspec_engine_queue_seconds",
            "From the arrival of a tree or calibration until a pass took it up.",
            buckets=STEP_BUCKETS,
        )
        self._phase_seconds = histogram(
            "easyspec_draft_phase_seconds",
            "Time of a draft by phase: the exact calibration pass, and all fuzzy steps.",
            ("phase",),
            buckets=STEP_BUCKETS,
        )
        self._ahead = counter(
            "easyspec_draft_ahead_verdicts",
            "Verdicts behind which a tree had been begun before they came, and verdicts that were guessed wrongly.",
            ("outcome",),
        )
        for outcome in ("hit", "miss"):  # known from the first scrape on
            self._ahead.labels(outcome)
        self._ahead_saved_seconds = counter(
            "easyspec_draft_ahead_saved_seconds", "Time of passes of the drafter that no round waited for."
        )

    def serves(self, model: ModelInfo, layer_groups: str = "") -> None:
        """Say which model answers, what computes it, and by which layer plan drafts are made; called once."""
        self._model.labels(model.name, model.executor, model.dtype, model.weight_format, layer_groups).set(1)

    def watch_usage(self, read_usage: Callable[[], KvUsage | None]) -> None:
        """Export KV memory and sessions; called once."""
        self.registry.register(_UsageCollector(read_usage))

    def step(self, report: StepReport) -> None:
        """Count a pass; called on the device thread."""
        self._step_seconds.labels(report.kind).observe(report.duration_ns * _NS)
        if report.num_sessions:
            self._step_rows.labels(report.kind).observe(report.num_rows)
            self._step_sessions.labels(report.kind).observe(report.num_sessions)

    def verdict(self, timings: VerifyTimings) -> None:
        self._queue_seconds.observe(timings.queue_ns * _NS)

    def draft(self, timings: DraftTimings) -> None:
        self._queue_seconds.observe(timings.queue_ns * _NS)
        self._phase_seconds.labels("calibrate").observe(timings.calibrate_ns * _NS)
        self._phase_seconds.labels("fuzzy").observe(timings.fuzzy_ns * _NS)
        if timings.ahead_ns is not None:
            self._ahead.labels("hit" if timings.ahead_ns else "miss").inc()
            self._ahead_saved_seconds.inc(timings.ahead_ns * _NS)


@dataclass(eq=False)
class _UsageCollector(Collector):
    read_usage: Callable[[], KvUsage | None]

    def collect(self) -> Iterator[Metric]:
        usage = self.read_usage()
        if usage is None:
            return
        yield GaugeMetricFamily("easyspec_kv_slots", "Token slots of the KV pool.", usage.num_slots)
        yield GaugeMetricFamily("easyspec_kv_slots_used", "Slots that sessions hold.", usage.num_used_slots)
        free = usage.num_slots - usage.num_used_slots
        yield GaugeMetricFamily("easyspec_kv_slots_free", "Slots that no session holds, cached ones included.", free)
        yield GaugeMetricFamily("easyspec_kv_slots_cached", "Free slots that keep prefixes.", usage.num_cached_slots)
        yield GaugeMetricFamily("easyspec_sessions", "Open sessions.", usage.num_sessions)
        queried, hit = usage.num_prefix_query_tokens, usage.num_prefix_hit_tokens
        yield CounterMetricFamily(
            "easyspec_prefix_query_tokens", "Tokens that opening sessions brought along.", queried
        )
        yield CounterMetricFamily("easyspec_prefix_hit_tokens", "Prompt tokens that were cached.", hit)
        text = "Sessions whose slots were taken back for older ones."
        yield CounterMetricFamily("easyspec_preemptions", text, usage.num_preemptions)
