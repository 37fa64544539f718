"""Server-sent events, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias, TypeVar

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from easyspec.errors import EasyspecError, UnavailableError
from gateway.messages.progress import Progress
from gateway.rest.errors import ClientGoneError, Failure, failure_of, json_bytes
from gateway.rest.gate import DRAINING

DONE = b"data: [DONE]\n\n"
# Most requests that fail after their admission, say for a schema, do so within this time and get an HTTP status.
STATUS_GRACE_S = 0.25
COMMENT_INTERVAL_S = 10.0
_LEAST_PAUSE_S = 0.01
_COMMENT = b": the answer is being made\n\n"

_ResultT = TypeVar("_ResultT")
# The last events of a stream that fails.
LastWords: TypeAlias = Callable[[Failure], bytes]
_log = structlog.get_logger(__name__)


def event(value: object, name: str = "") -> bytes:
    """One event that carries `value` as JSON, and may have a name."""
    heading = f"event: {name}\n".encode() if name else b""
    return heading + b"data: " + json_bytes(value) + b"\n\n"


class EventStream(Response):
    """Sends `events` (whole SSE events, as bytes) as they come, until the client goes away.

    What fails before the first event is raised, so that it gets its HTTP status. But once all of `progress` is
    admitted, the status does not wait for long: a prompt may take minutes to be read, and proxies take a silent server
    for a dead one. Hence comments, too, where nothing else is said. What fails later ends the stream with
    `last_words`. The generator is iterated and closed in one task.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], *progress: Progress, last_words: LastWords) -> None:
        self._last_words = last_words
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._progress = progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        writer = _EventSender(send, {"status": self.status_code, "headers": self.raw_headers})
        company = asyncio.create_task(writer.keep_company(self._progress))
        try:
            async with aclosing(self._events) as events:
                async for body in events:
                    await writer.send(body)
        except asyncio.CancelledError:
            if not writer.has_begun:
                raise
            await writer.send(self._last_words(failure_of(UnavailableError(DRAINING))))
        except Exception as error:
            if not writer.has_begun:
                raise
            if not isinstance(error, EasyspecError):
                _log.exception("http_bug")
            await writer.send(self._last_words(failure_of(error)))
        finally:
            company.cancel()
            await asyncio.gather(company, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _EventSender:
    """The response of a stream: its status when it is due, then events and comments, one at a time."""

    def __init__(self, send: Send, start: dict[str, Any]) -> None:
        self._send = send
        self._start = start
        self._lock = asyncio.Lock()
        self._spoke_s = 0.0
        self.has_begun = False

    async def send(self, body: bytes) -> None:
        async with self._lock:
            await self._begin()
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            self._spoke_s = time.monotonic()

    async def keep_company(self, progress: Sequence[Progress]) -> None:
        """Send the status soon after all was admitted, and a comment wherever there is a long silence."""
        for one in progress:
            await one.wait_admitted()
        await asyncio.sleep(STATUS_GRACE_S)
        for one in progress:
            await one.wait_moving()
        # A chunk may be sent at the same time; the status goes first, and once.
        async with self._lock:
            await self._begin()
        while True:
            silence_s = time.monotonic() - self._spoke_s
            if silence_s >= COMMENT_INTERVAL_S:
                await self.send(_COMMENT)
            await asyncio.sleep(max(COMMENT_INTERVAL_S - silence_s, _LEAST_PAUSE_S))

    async def _begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            self._spoke_s = time.monotonic()
            await self._send({"type": "http.response.start", **self._start})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _ResultT]) -> _ResultT:
    """Await `work`; as soon as the client has gone, cancel it and raise ClientGoneError. The body was read before."""

    async def until_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(until_gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():  # also if the client has gone at the same time
            return task.result()
        raise ClientGoneError
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
