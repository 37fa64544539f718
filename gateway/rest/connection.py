"""One HTTP connection: what it may cost before anything is known about its client. uvicorn bounds neither the head of a
request nor the time it takes to come, nor how many connections there are."""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Real heads have less than 10 KiB; browsers with many cookies send up to 40.
_MAX_HEAD_BYTES = 64 * 1024
# From the connection, or from the first byte of a further request, to the end of its head.
_HEAD_TIMEOUT_S = 20.0
_MAX_CONNECTIONS = 8192
_TOO_LARGE = b"431 Request Header Fields Too Large"
# Of the process's descriptors, for gRPC, files and everything else.
_NUM_OTHER_DESCRIPTORS = 512


def most_connections() -> int:
    """How many connections may be open at once; lets the process have as many descriptors as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):  # some systems promise more than they give
            pass
    if soft == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return max(1, min(_MAX_CONNECTIONS, soft - _NUM_OTHER_DESCRIPTORS, soft // 2))


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's, with a limit on a head's bytes, its time, and the number of connections. If there are too many, the
    one that has been idle longest makes room, and if none is idle, the new one is refused."""

    def __init__(self, max_connections: int, **what_uvicorn_gives: Any) -> None:
        super().__init__(**what_uvicorn_gives)
        self._max_connections = max_connections
        self._head_timer: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0
        self._is_in_body, self._is_all_head = False, True
        self._is_refused = False
        self._idle_since_s = time.monotonic()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            self._make_room()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused:
            return
        self._is_all_head = not self._is_in_body
        super().data_received(data)
        if self._is_all_head:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > _MAX_HEAD_BYTES:
                self._refuse(_TOO_LARGE)
        if self.is_idle:
            self._await_head()

    def on_message_begin(self) -> None:
        self._num_head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_body, self._is_all_head = True, False
        self._end_head_timer()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > _MAX_HEAD_BYTES:
            self._refuse(_TOO_LARGE)
        if not self._is_refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._is_refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_body, self._is_all_head = False, False
        self._num_head_bytes = 0
        if not self._is_refused:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        self._idle_since_s = time.monotonic()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _make_room(self) -> None:
        others: Any = self.connections - {self}
        idle = [each for each in others if each.is_idle and not each.transport.is_closing()]
        if idle:
            min(idle, key=lambda each: each._idle_since_s).transport.close()
        else:
            self._refuse(b"503 Service Unavailable")

    def _await_head(self) -> None:
        if self._head_timer is None and not self._is_refused:
            self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._refuse, b"408 Request Timeout")

    def _end_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: bytes) -> None:
        """Answer without a body, unless nothing was asked, and end the connection."""
        self._is_refused = True
        self._end_head_timer()
        if self._num_head_bytes or not status.startswith(b"408"):
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
        self.transport.close()
