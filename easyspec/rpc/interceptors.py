"""What stands between the wire and every RPC of ours: admission, request id, errors to statuses, one log event."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError

from easyspec.errors import InvalidRequestError, UnavailableError
from easyspec.rpc.channels import REQUEST_ID_KEY
from easyspec.rpc.errors import INTERNAL, abort, mapping_of
from easyspec.telemetry.metrics import RoleMetrics
from easyspec.telemetry.trace_context import TRACEPARENT_KEY, bind_traceparent
from easyspec.telemetry.tracing import Tracing

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Parser: TypeAlias = Callable[[Any], Any]
Authenticate: TypeAlias = Callable[[str | None], str | None]
_MAX_REQUEST_ID_CHARS = 128
_AUTHORIZATION_KEY = "authorization"

_log = structlog.get_logger(__name__)


class RpcBoundary(grpc.aio.ServerInterceptor):
    """Interceptor of one server; health and reflection pass untouched.

    Servicers behind it raise exceptions of `easyspec.errors` and write streaming methods as async generators, which
    are closed in the RPC's own task however the RPC ends. While `refuse` is in force, new RPCs get UNAVAILABLE.
    `authenticate` turns the `authorization` metadata into the client's name, raises UnauthenticatedError, or answers
    None: no key is needed, and a client is known by its network address. Either is bound as `client` for servicer and
    log, and the caller's trace for the next service. With `tracing` every RPC has a span but routine ones.
    """

    def __init__(
        self, refusal: str, authenticate: Authenticate, metrics: RoleMetrics, tracing: Tracing | None = None
    ) -> None:
        self._refusal: str | None = refusal
        self._authenticate = authenticate
        self._metrics = metrics
        self._tracing = tracing
        self._num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def admit(self) -> None:
        self._refusal = None

    def refuse(self, reason: str) -> None:
        """Answer new RPCs with UNAVAILABLE and `reason`; running ones go on."""
        self._refusal = reason

    async def wait_idle(self, timeout_s: float) -> bool:
        """True once no RPC is running, False if `timeout_s` passed before."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return await self._idle.wait()
        return False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith("/grpc."):
            return handler
        deserialize, parse = _parsers(handler)
        asked = "stream" if handler.request_streaming else "unary"
        answered = "stream" if handler.response_streaming else "unary"
        behavior: Any = getattr(handler, f"{asked}_{answered}")

        async def respond(request: Any, context: _Context) -> Any:
            async with self._rpc(method, context):
                if not handler.response_streaming:
                    return await behavior(parse(request), context)
                # A coroutine that writes, not a generator that yields: a cancelled RPC would leave a generator
                # suspended until it is collected, and what its `finally` frees along with it.
                async with aclosing(behavior(parse(request), context)) as responses:
                    async for response in responses:
                        await context.write(response)
                return None

        make = getattr(grpc, f"{asked}_{answered}_rpc_method_handler")
        wrapped: _Handler = make(respond, deserialize, handler.response_serializer)
        return wrapped

    @asynccontextmanager
    async def _rpc(self, method: str, context: _Context) -> AsyncIterator[None]:
        # gRPC runs every RPC in a task of its own, so this binds it for this RPC alone.
        request_id = _metadata(context, REQUEST_ID_KEY) or ""
        # The caller's if it is fit for a log, else a new one.
        request_id = request_id[:_MAX_REQUEST_ID_CHARS] if request_id.isprintable() else ""
        request_id = request_id or uuid.uuid4().hex
        structlog.contextvars.bind_contextvars(request_id=request_id)
        traceparent, span = _metadata(context, TRACEPARENT_KEY), None
        bind_traceparent(traceparent)
        if self._tracing is not None and not _is_routine(method):
            span = self._tracing.span(method.lstrip("/"), traceparent, {"easyspec.request_id": request_id})
        started_ns = time.monotonic_ns()
        outcome = {"code": "OK"}
        self._num_active += 1
        self._idle.clear()
        try:
            if self._refusal is not None:
                raise UnavailableError(self._refusal)
            name = self._authenticate(_metadata(context, _AUTHORIZATION_KEY))
            structlog.contextvars.bind_contextvars(client=name or context.peer().rpartition(":")[0])
            yield
        except asyncio.CancelledError:
            outcome = {"code": "CANCELLED"}
            raise
        except Exception as raised:
            error = raised
            if isinstance(raised, DecodeError):
                allowed = "a protobuf message of this method's type"
                error = InvalidRequestError("message", "bytes that do not parse", allowed)
            # Reason and field, not the message: it may show a token id.
            row = mapping_of(error)
            outcome = {"code": row.code.name, "reason": row.reason}
            if isinstance(error, InvalidRequestError):
                outcome["field"] = error.field
            if row is INTERNAL:
                _log.exception("rpc_bug", method=method)
            await abort(context, error, structlog.contextvars.get_contextvars()["request_id"])
        finally:
            duration_ms = (time.monotonic_ns() - started_ns) / 1e6
            # Services ask each other for their info every few seconds.
            log = _log.debug if outcome["code"] == "OK" and _is_routine(method) else _log.info
            log("rpc_finished", method=method, duration_ms=round(duration_ms, 3), **outcome)
            self._metrics.rpc_finished(method, outcome["code"])
            if "reason" in outcome:
                self._metrics.refused(outcome["reason"])
            if span is not None:
                span.end({"rpc.grpc.status_code": outcome["code"]}, outcome.get("reason"))
            self._num_active -= 1
            if self._num_active == 0:
                self._idle.set()


def _is_routine(method: str) -> bool:
    name = method.rpartition("/")[2]
    return name.startswith("Get") and name.endswith("Info")


def _parsers(handler: _Handler) -> tuple[_Parser | None, _Parser]:
    """What gRPC parses messages with, and what we parse the request with.

    gRPC parses a single request before we are asked and answers bytes that do not parse with UNKNOWN; so that one is
    ours. The messages of a stream are parsed while the servicer waits for them, inside the boundary.
    """
    if handler.request_streaming or handler.request_deserializer is None:
        return handler.request_deserializer, lambda request: request
    return None, handler.request_deserializer


def _metadata(context: _Context, name: str) -> str | None:
    """The first text of that name among the caller's metadata."""
    pairs = context.invocation_metadata() or ()
    return next((value for key, value in pairs if key == name and isinstance(value, str)), None)
