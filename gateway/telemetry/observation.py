"""The one place where a request is observed: which observers there are, and what they are told."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol, TypeAlias

import structlog

from gateway.messages.statistics import NO_ROUND

if TYPE_CHECKING:
    from gateway.messages.chunk import Completion, GenerationChunk
    from gateway.messages.request import GenerationRequest

_log = structlog.get_logger()


@dataclass
class RequestTotals:
    """What the rounds of a request came to, all its choices together."""

    num_prompt_tokens: int = 0
    num_rounds: int = 0
    num_output_tokens: int = 0
    num_accepted_tokens: int = 0
    num_draft_tokens: int = 0


@dataclass(frozen=True)
class Ending:
    """How a request ended. `reason` is stop or length (of its last choice), abort (the client went away) or error;
    `completions` are those choices that came to their end, by index, and `error` is there for the last."""

    reason: str
    completions: Mapping[int, Completion]
    is_complete: bool = False
    error: Exception | None = None
    totals: RequestTotals = field(default_factory=RequestTotals)


class RequestObserver(Protocol):
    """Follows one request. Called in the event loop, so quick; raises nothing."""

    def started(self, num_prompt_tokens: int, queue_ns: int) -> None:
        """The request has its place, after waiting for it `queue_ns` nanoseconds; decoding begins."""

    def round(self, chunk: GenerationChunk) -> None:
        """A round of one choice is over; called before its chunk goes to the client. Not for an echoed prompt."""

    def finished(self, ending: Ending) -> None:
        """Called once, last, however the request ended."""


# Called when a request comes in, with the base model's name, for the observer that follows it.
GenerationObserver: TypeAlias = "Callable[[GenerationRequest, str], RequestObserver]"


class ObservedRequest:
    """A request and its observers. One that breaks is a bug, which is logged, and costs neither request nor others."""

    def __init__(self, observers: Sequence[RequestObserver]) -> None:
        self._observers = observers
        self.totals = RequestTotals()
        self.completions: dict[int, Completion] = {}

    def started(self, num_prompt_tokens: int, queue_ns: int) -> None:
        self.totals.num_prompt_tokens = num_prompt_tokens
        for observer in self._observers:
            with _bugs_logged():
                observer.started(num_prompt_tokens, queue_ns)

    def after_chunk(self, chunk: GenerationChunk) -> None:
        """To be called with every chunk."""
        if chunk.completion is not None:
            self.completions[chunk.choice_index] = chunk.completion
        if chunk.timings is NO_ROUND:
            return
        self.totals.num_rounds += 1
        self.totals.num_output_tokens += len(chunk.token_ids)
        self.totals.num_accepted_tokens += chunk.num_accepted
        self.totals.num_draft_tokens += chunk.timings.num_draft_tokens
        for observer in self._observers:
            with _bugs_logged():
                observer.round(chunk)

    def finished(self, ending: Ending) -> None:
        for observer in self._observers:
            with _bugs_logged():
                observer.finished(ending)


class _bugs_logged:  # noqa: N801
    """Around an observer's work. A class, not a generator: it is entered every round."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            _log.exception("observer_bug")
        return isinstance(error, Exception)


class RequestLog:
    """One event per request, at its end: counts, reasons and durations; no text, no token ids."""

    def __init__(self, request: GenerationRequest, model: str) -> None:
        self._request = request
        self._model = model
        self._started_ns = time.monotonic_ns()
        self._queue_ns = 0
        self._first_ns: int | None = None

    def started(self, num_prompt_tokens: int, queue_ns: int) -> None:
        self._queue_ns = queue_ns

    def round(self, chunk: GenerationChunk) -> None:
        self._first_ns = self._first_ns or time.monotonic_ns()

    def finished(self, ending: Ending) -> None:
        now_ns = time.monotonic_ns()
        first_ns = self._first_ns
        statistics = [completion.statistics for completion in ending.completions.values()]
        _log.info(
            "request_finished",
            request_id=self._request.request_id,
            client=self._request.client,
            model=self._model,
            num_choices=self._request.num_choices,
            reason=ending.reason,
            error=type(ending.error).__name__ if ending.error is not None else None,
            **vars(ending.totals),
            num_drafter_failures=sum(each.num_drafter_failures for each in statistics),
            num_verifier_failures=sum(each.num_verifier_failures for each in statistics),
            queue_ms=round(self._queue_ns / 1e6, 3),
            first_token_ms=round((first_ns - self._started_ns) / 1e6, 3) if first_ns is not None else None,
            duration_ms=round((now_ns - self._started_ns) / 1e6, 3),
        )


@contextlib.contextmanager
def observed(
    request: GenerationRequest, model: str, observers: Sequence[GenerationObserver]
) -> Iterator[ObservedRequest]:
    """Follow a request through the block; then tell how it ended."""
    observed_request = ObservedRequest([observer(request, model) for observer in observers])
    completions, totals = observed_request.completions, observed_request.totals
    ending = Ending("abort", completions, totals=totals)
    try:
        yield observed_request
    except Exception as error:
        ending = replace(ending, reason="error", error=error)
        raise
    finally:
        # A client may well go away, or be cancelled, once it has the last chunk.
        if ending.error is None and len(completions) >= request.num_choices:
            reason = [*completions.values()][-1].finish_reason.value
            ending = replace(ending, reason=reason, is_complete=True)
        observed_request.finished(ending)
