"""What stands between HTTP and every route: API keys, body limit, admission, request id, errors, one log event."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import Iterable

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from easyspec.errors import EasyspecError, UnavailableError
from easyspec.rpc.errors import mapping_of
from easyspec.telemetry.trace_context import TRACEPARENT_KEY, bind_traceparent
from gateway.rest.backend import Backend
from gateway.rest.errors import CLIENT_CLOSED_REQUEST, ClientGoneError, Failure, RefusalError, failure_of
from gateway.rest.gate import DRAINING, Gate
from gateway.rest.playground import PATHS as PLAYGROUND_PATHS
from gateway.rest.trust import Door

REQUEST_ID_HEADER = b"x-request-id"
# Answer while the gateway is loading or draining, too: these tell what is going on.
ALWAYS_OPEN = frozenset({"/version", "/metrics"}) | PLAYGROUND_PATHS
_MAX_REQUEST_ID_CHARS = 128
_BODY_TIMEOUT_S = 60.0
_OK = 200
# Scrapers and probes come every few seconds.
_ROUTINE = frozenset({"/health", "/metrics"})

_log = structlog.get_logger(__name__)


class RestBoundary:
    """ASGI middleware around the whole application. Keys are asked for at `door`, before a body is read."""

    def __init__(self, app: ASGIApp, gate: Gate, door: Door, backend: Backend) -> None:
        self._app = app
        self._gate = gate
        self._door = door
        self._max_body_bytes = backend.settings.max_request_bytes
        self._observer = backend.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        # Base URLs end in a slash, or not, and clients join what they like.
        scope = {**scope, "path": re.sub("/{2,}", "/", scope["path"]).rstrip("/") or "/"}
        # uvicorn runs every request in a task of its own, so this binds it for this request alone.
        request_id = _request_id(scope["headers"])
        structlog.contextvars.bind_contextvars(request_id=request_id)
        bind_traceparent(_text_of(scope["headers"], TRACEPARENT_KEY.encode()))
        answer = _Answer(send, request_id)
        started_ns = time.monotonic_ns()
        try:
            client = self._door.enter(scope)
            if client is not None:
                structlog.contextvars.bind_contextvars(client=client)
                scope.setdefault("state", {})["client"] = client
            replay = _replay(await self._read_body(scope, receive), receive)
            # A HEAD is routed as GET. uvicorn reads the method in the scope that we leave as it is, and drops the body.
            asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            with contextlib.nullcontext() if scope["path"] in ALWAYS_OPEN else self._gate.entered():
                await self._app(asked, replay, answer.send)
            scope["route"] = asked.get("route")
        except ClientGoneError:
            answer.status = answer.status or CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            # Only draining cancels a request as a whole, and this is the end of it anyway.
            await answer.fail(failure_of(UnavailableError(DRAINING)), scope, receive)
        except RefusalError as error:
            await answer.fail(error.failure, scope, receive, error.is_closing)
        except Exception as error:
            if not isinstance(error, EasyspecError):
                _log.exception("http_bug", path=_route(scope))
            self._observer.refused(mapping_of(error).reason)
            await answer.fail(failure_of(error), scope, receive)
        finally:
            duration_ms = (time.monotonic_ns() - started_ns) / 1e6
            route, method, status = _route(scope), scope["method"], answer.status or CLIENT_CLOSED_REQUEST
            log = _log.debug if route in _ROUTINE and status == _OK else _log.info
            log("http_finished", method=method, path=route, status=status, duration_ms=round(duration_ms, 3))
            self._observer.http_finished(route, method, status)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body: requests are small, and a refusal should not wait for the rest of a large one."""
        body = bytearray()
        lengths = (value[:18] for name, value in scope["headers"] if name == b"content-length" and value.isdigit())
        num_announced = max(map(int, lengths), default=0)
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                while max(num_announced, len(body)) <= self._max_body_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    body += message.get("body", b"")
                    if not message.get("more_body", False) and len(body) <= self._max_body_bytes:
                        return bytes(body)
        except TimeoutError:
            late = Failure(408, f"the body did not come within {_BODY_TIMEOUT_S:g} s", code="timeout")
            raise RefusalError(late, is_closing=True) from None
        large = Failure(413, f"the body has more than {self._max_body_bytes} bytes", code="request_too_large")
        # Not closing: a client that writes its whole request before it reads would never see the answer.
        raise RefusalError(large)


class _Answer:
    """The response of one request: adds the request id, remembers the status."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        await self._send(message)

    async def fail(self, failure: Failure, scope: Scope, receive: Receive, is_closing: bool = False) -> None:
        """Send `failure`, unless the response is under way already."""
        if self.status is not None:
            return
        response = failure.response_to(scope["path"])
        if is_closing:
            response.headers["connection"] = "close"
        await response(scope, receive, self.send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that yields the body that was read, then goes on with what the server says."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()

    return receive_again


def _request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The caller's request id if it is fit for a log, else a new one."""
    text = _text_of(headers, REQUEST_ID_HEADER)
    return text[:_MAX_REQUEST_ID_CHARS] if text and text.isprintable() else uuid.uuid4().hex


def _text_of(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> str | None:
    return next((value.decode("ascii", errors="ignore") for name, value in headers if name == wanted), None)


def _route(scope: Scope) -> str:
    """The route's template, not the path, which may hold anything."""
    route = scope.get("route")
    return str(getattr(route, "path", "unrouted"))
