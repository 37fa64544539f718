"""The REST side of the gateway, from open port to closed: uvicorn inside the event loop that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import Iterator

import structlog
import uvicorn

from easyspec.errors import ConfigurationError
from easyspec.rpc.tls import ServerCertificates
from gateway.rest.app import create_app
from gateway.rest.backend import Backend
from gateway.rest.connection import BoundedConnection, most_connections
from gateway.rest.gate import Gate

# Longer than clients keep idle connections, so that they, not we, close them: no request meets a closing one.
_KEEP_ALIVE_S = 75
_CLOSE_GRACE_S = 2
_BACKLOG = 2048
_POLL_S = 0.002

_log = structlog.get_logger(__name__)


class _EmbeddedServer(uvicorn.Server):
    """Leaves signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class RestServer:
    """`open` (all is refused; `port` is known), `admit`, `drain`, `close`: in this order, in the gateway's event
    loop."""

    def __init__(self, backend: Backend) -> None:
        self._address = backend.settings.http_address
        self._gate = Gate()
        config = uvicorn.Config(
            create_app(backend, self._gate),
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_CLOSE_GRACE_S,
            backlog=_BACKLOG,
        )
        config.load()
        config.http_protocol_class = functools.partial(BoundedConnection, most_connections())  # type: ignore[assignment]
        tls = backend.settings.server_tls
        # Made by us: uvicorn reads its own from files once, and misses their renewal.
        config.ssl = ServerCertificates(tls).ssl_context() if tls is not None else None
        self._server = _EmbeddedServer(config)
        self._task: asyncio.Task[None] | None = None
        self.port: int | None = None

    async def open(self) -> None:
        """Open the port; ConfigurationError with the system's reason if it cannot be had."""
        listening = _bound(self._address)
        self._task = asyncio.create_task(self._server.serve([listening]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(_POLL_S)
        self.port = int(listening.getsockname()[1])
        host = self._address.rpartition(":")[0]
        _log.info("rest_listening", address=f"{host}:{self.port}", port=self.port)

    def admit(self) -> None:
        self._gate.admit()

    async def drain(self, grace_s: float) -> None:
        if not await self._gate.drain(grace_s):
            _log.error("http_request_ignores_cancellation")

    async def close(self) -> None:
        """Close the port and all connections. Idempotent."""
        if self._task is not None:
            self._server.should_exit = True
            await self._task
            self._task = None


def _bound(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise ConfigurationError(f"http_address is {address!r}: cannot listen there: {reason}") from None
    listening.setblocking(False)
    return listening
