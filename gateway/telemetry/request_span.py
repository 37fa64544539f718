"""One span per request, its rounds being events of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from easyspec.telemetry.trace_context import bind_traceparent, current_traceparent
from easyspec.telemetry.tracing import Attributes, TracedSpan, Tracing

if TYPE_CHECKING:
    from gateway.messages.chunk import GenerationChunk
    from gateway.messages.request import GenerationRequest
    from gateway.telemetry.observation import Ending, GenerationObserver, RequestObserver


def request_spans(tracing: Tracing) -> GenerationObserver:
    """An observer that traces every request, under the client's span if it sent one. The streams to drafter and
    verifier, which are opened afterwards in the same task or in tasks of it, become children."""

    def begin(request: GenerationRequest, model: str) -> RequestObserver:
        attributes: Attributes = {
            "easyspec.request_id": request.request_id,
            "easyspec.client": request.client,
            "easyspec.model": model,
            "easyspec.num_choices": request.num_choices,
        }
        span = tracing.span("generate", current_traceparent(), attributes)
        bind_traceparent(span.traceparent)
        return _RequestSpan(span)

    return begin


class _RequestSpan:
    """Follows one request."""

    def __init__(self, span: TracedSpan) -> None:
        self._span = span

    def started(self, num_prompt_tokens: int, queue_ns: int) -> None:
        self._span.event("started", {"num_prompt_tokens": num_prompt_tokens, "queue_ms": queue_ns / 1e6})

    def round(self, chunk: GenerationChunk) -> None:
        timings = chunk.timings
        attributes: Attributes = {
            "choice": chunk.choice_index,
            "num_draft_tokens": timings.num_draft_tokens,
            "num_draft_levels": timings.num_draft_levels,
            "num_accepted": chunk.num_accepted,
            "num_output_tokens": len(chunk.token_ids),
            **{f"{name}_ms": duration_ms for name, duration_ms in timings.milliseconds.items()},
        }
        self._span.event("round", attributes)

    def finished(self, ending: Ending) -> None:
        totals = ending.totals
        attributes: Attributes = {
            "easyspec.finish_reason": ending.reason,
            "easyspec.num_prompt_tokens": totals.num_prompt_tokens,
            "easyspec.num_output_tokens": totals.num_output_tokens,
            "easyspec.num_rounds": totals.num_rounds,
            "easyspec.num_accepted_tokens": totals.num_accepted_tokens,
        }
        self._span.end(attributes, type(ending.error).__name__ if ending.error is not None else None)
