"""Server-sent events, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from easyspec.errors import EasyspecError, UnavailableError
from gateway.rest.errors import ClientGoneError, failure_of, json_bytes
from gateway.rest.gate import DRAINING

DONE = b"data: [DONE]\n\n"

_ResultT = TypeVar("_ResultT")
_log = structlog.get_logger(__name__)


def event(value: object) -> bytes:
    """One event that carries `value` as JSON."""
    return b"data: " + json_bytes(value) + b"\n\n"


class EventStream(Response):
    """Sends `events` (whole SSE events, as bytes) as they come, until the client goes away.

    What fails before the first event is raised, so that it gets its HTTP status. What fails later ends the stream
    with an error event and `[DONE]`. The generator is iterated and closed in one task.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            body = await anext(events)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await _send_body(send, body)
            try:
                async for body in events:
                    await _send_body(send, body)
            except asyncio.CancelledError:
                await _send_body(send, _last_words(UnavailableError(DRAINING)))
            except Exception as error:
                if not isinstance(error, EasyspecError):
                    _log.exception("http_bug")
                await _send_body(send, _last_words(error))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _ResultT]) -> _ResultT:
    """Await `work`; as soon as the client has gone, cancel it and raise ClientGoneError. The body was read before."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_until_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_body(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _last_words(error: Exception) -> bytes:
    request_id = str(structlog.contextvars.get_contextvars().get("request_id", ""))
    return event(failure_of(error, request_id).body) + DONE
