"""An OpenTelemetry collector that keeps what it is sent: a real gRPC server on a free port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class CollectedSpan:
    """One span, attributes as plain values; ids are hexadecimal."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    events: tuple[tuple[str, dict[str, Any]], ...]
    is_error: bool


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """`raw` is everything that came over the wire."""

    endpoint: str = ""
    spans: list[CollectedSpan] = field(default_factory=list)
    raw: bytes = b""

    async def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.raw += request.SerializeToString()
        for resource_spans in request.resource_spans:
            service = _plain(resource_spans.resource.attributes)["service.name"]
            for scope_spans in resource_spans.scope_spans:
                self.spans += [_collected(service, span) for span in scope_spans.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, service: str) -> list[CollectedSpan]:
        return [span for span in self.spans if span.service == service]


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield collector
    finally:
        await server.stop(None)


def _collected(service: str, span: Any) -> CollectedSpan:
    events = tuple((event.name, _plain(event.attributes)) for event in span.events)
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    return CollectedSpan(service, span.name, *ids, _plain(span.attributes), events, span.status.code == 2)


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
