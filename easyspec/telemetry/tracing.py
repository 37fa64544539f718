"""OpenTelemetry spans, sent to a collector over OTLP. Optional: the library is imported only where an endpoint is set.

Attributes are counts, times and names; never prompts, completions or token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import urlsplit

from easyspec import __version__
from easyspec.errors import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanKind

Attributes: TypeAlias = Mapping[str, str | int | float | bool]

# A round is an event, and a long answer has hundreds; beyond this the oldest are dropped.
_MAX_EVENTS = 1024
_EXPORT_DELAY_MS = 1000
_EXPORT_TIMEOUT_S = 5
_SHUTDOWN_TIMEOUT_S = 5.0


class TracedSpan:
    def __init__(self, span: Span) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """What to send on, so that others' spans become children of this one."""
        context = self._span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"

    def event(self, name: str, attributes: Attributes) -> None:
        self._span.add_event(name, attributes)

    def end(self, attributes: Attributes, error: str | None = None) -> None:
        """Call once. `error` is a reason, not a message, which may quote the request."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


class Tracing:
    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("easyspec", __version__)

    def span(self, name: str, traceparent: str | None, attributes: Attributes) -> TracedSpan:
        """Start a span for requested work; without a (sampled or not) parent it begins a trace."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = Context()
        if traceparent is not None:
            parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent}, context=parent)
        kind: SpanKind = SpanKind.SERVER
        return TracedSpan(self._tracer.start_span(name, context=parent, kind=kind, attributes=attributes))

    async def close(self) -> None:
        """Send what is waiting, and stop; gives up after a few seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SHUTDOWN_TIMEOUT_S):
                await asyncio.to_thread(self._provider.shutdown)


def open_tracing(role: str, endpoint: str | None) -> Tracing | None:
    """Tracing to the collector at `endpoint` (`http://host:4317`); None without one.

    Raises ConfigurationError if the library is not installed. Sampling follows OTEL_TRACES_SAMPLER, and the parent's
    decision where there is one.
    """
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanLimits, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"otlp_endpoint is set, but {error.name} is not installed: pip install 'easyspec[tracing]'"
        ) from None
    exporter = OTLPSpanExporter(endpoint, insecure=urlsplit(endpoint).scheme == "http", timeout=_EXPORT_TIMEOUT_S)
    provider = TracerProvider(
        resource=Resource.create({"service.name": f"easyspec-{role}", "service.version": __version__}),
        span_limits=SpanLimits(max_events=_MAX_EVENTS),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_DELAY_MS))
    return Tracing(provider)
