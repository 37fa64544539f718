"""A small HTTP port for scrapers and probes: GET /metrics and GET /health, nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from http import HTTPStatus

from easyspec.errors import ConfigurationError
from easyspec.telemetry.metrics import CONTENT_TYPE, RoleMetrics

_MAX_HEAD_BYTES = 8192
_TIMEOUT_S = 5.0
_MAX_CONNECTIONS = 32
_TEXT = "text/plain; charset=utf-8"


class MetricsServer:
    """Serves `metrics` in the running event loop. One request a connection: scrapes are seconds apart.

    /health answers 200 while `is_serving` says so and 503 otherwise. Neither path asks for a key: metrics hold counts
    and times only.
    """

    def __init__(self, metrics: RoleMetrics, is_serving: Callable[[], bool], tls: ssl.SSLContext | None = None) -> None:
        self._metrics = metrics
        self._is_serving = is_serving
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._num_connections = 0

    async def listen(self, address: str) -> int:
        """Open the port and return it; ConfigurationError if it cannot be had."""
        host, _, port = address.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._answer, host.strip("[]"), int(port), limit=_MAX_HEAD_BYTES, ssl=self._tls
            )
        except OSError as error:
            reason = error.strerror or error
            raise ConfigurationError(f"metrics_address is {address!r}: cannot listen there: {reason}") from None
        bound: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return bound[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_connections += 1
        try:
            # A client that went away, sends no head or too long a one, or does not read, is not worth an event.
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                async with asyncio.timeout(_TIMEOUT_S):
                    if self._num_connections > _MAX_CONNECTIONS:
                        writer.write(_response(HTTPStatus.SERVICE_UNAVAILABLE, b"too many connections\n"))
                    else:
                        writer.write(self._respond(await reader.readuntil(b"\r\n\r\n")))
                    await writer.drain()
        finally:
            self._num_connections -= 1
            writer.close()

    def _respond(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if path not in (b"/metrics", b"/health"):
            return _response(HTTPStatus.NOT_FOUND, b"here are /metrics and /health\n")
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"GET only\n")
        if path == b"/health":
            is_serving = self._is_serving()
            status = HTTPStatus.OK if is_serving else HTTPStatus.SERVICE_UNAVAILABLE
            return _response(status, b"SERVING\n" if is_serving else b"NOT_SERVING\n", with_body=method == b"GET")
        body = self._metrics.render()
        return _response(HTTPStatus.OK, body, CONTENT_TYPE, with_body=method == b"GET")


def _response(status: HTTPStatus, body: bytes, content_type: str = _TEXT, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
