"""Server-sent events, and work that ends when the client goes away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
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
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._progress = progress
        self._last_words = last_words
        self._lock = asyncio.Lock()  # events and comments go one at a time
        self._has_begun = False
        self._spoke_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        await while_connected(receive, self._send_all())

    async def _send_all(self) -> None:
        company = asyncio.create_task(self._keep_company())
        try:
            async with aclosing(self._events) as events:
                async for body in events:
                    await self._say(body)
        except (Exception, asyncio.CancelledError) as error:
            if not self._has_begun:
                raise
            if not isinstance(error, EasyspecError | asyncio.CancelledError):
                _log.exception("http_bug")
            told = UnavailableError(DRAINING) if isinstance(error, asyncio.CancelledError) else error
            await self._say(self._last_words(failure_of(told)))
        finally:
            company.cancel()
            await asyncio.gather(company, return_exceptions=True)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _say(self, body: bytes) -> None:
        async with self._lock:
            await self._begin()
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            self._spoke_s = time.monotonic()

    async def _keep_company(self) -> None:
        """Send the status soon after all was admitted, and a comment wherever there is a long silence."""
        for one in self._progress:
            await one.wait_admitted()
        await asyncio.sleep(STATUS_GRACE_S)
        for one in self._progress:
            await one.wait_moving()
        # A chunk may be sent at the same time; the status goes first, and once.
        async with self._lock:
            await self._begin()
        while True:
            silence_s = time.monotonic() - self._spoke_s
            if silence_s >= COMMENT_INTERVAL_S:
                await self._say(_COMMENT)
            await asyncio.sleep(max(COMMENT_INTERVAL_S - silence_s, _LEAST_PAUSE_S))

    async def _begin(self) -> None:
        """The status, when it is due."""
        if not self._has_begun:
            self._has_begun = True
            self._spoke_s = time.monotonic()
            await self._send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})


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
