"""What the gateway measures: vLLM's metrics by their names, which dashboards and routers know, and our own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram

from easyspec.telemetry.metrics import STEP_BUCKETS, RoleMetrics

if TYPE_CHECKING:
    from gateway.messages.chunk import GenerationChunk
    from gateway.messages.request import GenerationRequest
    from gateway.telemetry.observation import Ending, RequestObserver

# vLLM's own buckets, so that its dashboards show the same resolution.
_FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0)
_COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_REASONS = ("stop", "length", "abort", "error")
_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})
_MODEL = ("model_name",)
_FURTHER_LABELLED = frozenset({"finished", "accepted_per_position", "drafted_per_position"})
_NS = 1e-9


class GatewayMetrics(RoleMetrics):
    """The gateway's metrics; a GenerationObserver, and asked for at every scrape. All of a model's carry its name."""

    def __init__(self) -> None:
        super().__init__("gateway")
        self._http_requests = Counter(
            "easyspec_http_requests",
            "HTTP requests answered.",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._ignored_fields = Counter(
            "easyspec_http_requests_with_ignored_fields",
            "REST requests of which a field was ignored (--unknown-fields ignore).",
            registry=self.registry,
        )
        self._instruments = _Instruments(self)
        self._by_model: dict[str, _ModelMetrics] = {}

    def __call__(self, request: GenerationRequest, model: str) -> RequestObserver:
        if model not in self._by_model:
            self._by_model[model] = _ModelMetrics(self._instruments, model)
        return _RequestMetrics(self._by_model[model])

    def http_finished(self, route: str, method: str, status: int) -> None:
        """Count an HTTP request. `route` is the template of one of our routes, not the path."""
        self._http_requests.labels(route, method if method in _METHODS else "other", str(status)).inc()

    def fields_ignored(self) -> None:
        self._ignored_fields.inc()


class _Instruments:
    """Every metric of a request, not yet bound to a model."""

    def __init__(self, metrics: RoleMetrics) -> None:
        registry = metrics.registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*_MODEL, *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _MODEL, buckets=buckets, registry=registry)

        self.first_token = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_BUCKETS
        )
        self.inter_token = histogram(
            "vllm:inter_token_latency_seconds",
            "Between two messages of a stream, each with all tokens of a round.",
            _TOKEN_BUCKETS,
        )
        self.per_output_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Per request: time after the first token by the tokens after it.",
            _TOKEN_BUCKETS,
        )
        self.request_seconds = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", _REQUEST_BUCKETS
        )
        self.queue_seconds = histogram(
            "vllm:request_queue_time_seconds", "Waiting for a place at the gateway.", _REQUEST_BUCKETS
        )
        self.prompt_size = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _COUNT_BUCKETS)
        self.output_size = histogram("vllm:request_generation_tokens", "Output tokens of a request.", _COUNT_BUCKETS)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens.")
        self.output_tokens = counter("vllm:generation_tokens", "Output tokens.")
        self.finished = counter(
            "vllm:request_success",
            "Choices that ended, by how; abort and error: requests.",
            "finished_reason",
        )
        self.drafts = counter("vllm:spec_decode_num_drafts", "Rounds that had a tree.")
        self.draft_tokens = counter("vllm:spec_decode_num_draft_tokens", "Nodes of trees.")
        self.accepted_tokens = counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens that were emitted.")
        self.accepted_per_position = counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Draft tokens emitted, by tree level from 0.", "position"
        )
        self.drafted_per_position = counter(
            "easyspec_drafted_levels", "Rounds whose tree had this level, counted from 0.", "position"
        )
        self.rounds = counter("easyspec_rounds", "Verdicts.")
        self.drafter_failures = counter("easyspec_drafter_failures", "Draft sessions that were lost, late or refused.")
        self.verifier_failures = counter("easyspec_verifier_failures", "Rounds that met a lost verifier.")
        self.draft_seconds = histogram(
            "easyspec_round_draft_seconds", "Of a round with a tree: waiting for the drafter.", STEP_BUCKETS
        )
        self.verify_seconds = histogram(
            "easyspec_round_verify_seconds", "Of a round: waiting for the verifier.", STEP_BUCKETS
        )
        self.overhead_seconds = histogram(
            "easyspec_round_overhead_seconds", "Of a round: everything else, the client included.", STEP_BUCKETS
        )


class _ModelMetrics(_Instruments):
    """The same, bound to one model: looking labels up costs more than counting."""

    def __init__(self, instruments: _Instruments, model: str) -> None:
        for name, metric in vars(instruments).items():
            setattr(self, name, metric if name in _FURTHER_LABELLED else metric.labels(model))
        for reason in _REASONS:  # so that they are there, as 0, before the first
            self.finished.labels(model, reason)
        self._model = model
        self._drafted: list[Counter] = []
        self._accepted: list[Counter] = []

    def count_ending(self, reason: str) -> None:
        """Count a request, or a choice of it, that ended so."""
        self.finished.labels(self._model, reason).inc()

    def count_levels(self, num_drafted: int, num_accepted: int) -> None:
        """Count a tree's levels, of which the first `num_accepted` were emitted."""
        while len(self._drafted) < num_drafted:
            position = str(len(self._drafted))
            self._drafted.append(self.drafted_per_position.labels(self._model, position))
            self._accepted.append(self.accepted_per_position.labels(self._model, position))
        for counter in self._drafted[:num_drafted]:
            counter.inc()
        for counter in self._accepted[:num_accepted]:
            counter.inc()


class _ChoiceClock:
    """When the messages of one choice went out, and how many tokens the first of them had."""

    def __init__(self, now_ns: int, num_tokens: int) -> None:
        self.first_ns = self.last_ns = now_ns
        self.num_first_tokens = num_tokens


class _RequestMetrics:
    """Follows one request."""

    def __init__(self, model: _ModelMetrics) -> None:
        self._model = model
        self._arrival_ns = time.monotonic_ns()
        self._clocks: dict[int, _ChoiceClock] = {}

    def started(self, num_prompt_tokens: int, queue_ns: int) -> None:
        self._model.queue_seconds.observe(queue_ns * _NS)
        self._model.prompt_tokens.inc(num_prompt_tokens)

    def round(self, chunk: GenerationChunk) -> None:
        model, timings = self._model, chunk.timings
        num_tokens = len(chunk.token_ids)
        now_ns = time.monotonic_ns()
        clock = self._clocks.get(chunk.choice_index)
        if clock is None:
            self._clocks[chunk.choice_index] = _ChoiceClock(now_ns, num_tokens)
            model.first_token.observe((now_ns - self._arrival_ns) * _NS)
        else:
            model.inter_token.observe((now_ns - clock.last_ns) * _NS)
            clock.last_ns = now_ns
        model.rounds.inc()
        model.output_tokens.inc(num_tokens)
        model.verify_seconds.observe(timings.verify_ns * _NS)
        model.overhead_seconds.observe(max(0, timings.round_ns - timings.draft_ns - timings.verify_ns) * _NS)
        if timings.num_draft_tokens:
            model.draft_seconds.observe(timings.draft_ns * _NS)
            model.drafts.inc()
            model.draft_tokens.inc(timings.num_draft_tokens)
            model.accepted_tokens.inc(chunk.num_accepted)
            model.count_levels(timings.num_draft_levels, chunk.num_accepted)

    def finished(self, ending: Ending) -> None:
        model = self._model
        for completion in ending.completions.values():
            model.drafter_failures.inc(completion.statistics.num_drafter_failures)
            model.verifier_failures.inc(completion.statistics.num_verifier_failures)
        if not ending.is_complete:
            model.count_ending(ending.reason)
            return
        for index, completion in ending.completions.items():
            clock = self._clocks[index]
            model.count_ending(completion.finish_reason.value)
            model.request_seconds.observe((clock.last_ns - self._arrival_ns) * _NS)
            model.prompt_size.observe(completion.num_prompt_tokens)
            model.output_size.observe(completion.num_output_tokens)
            num_later_tokens = completion.num_output_tokens - clock.num_first_tokens
            if num_later_tokens > 0:
                model.per_output_token.observe((clock.last_ns - clock.first_ns) * _NS / num_later_tokens)
