"""The REST side of the gateway, from open port to closed."""

from __future__ import annotations

import ssl

import structlog

from gateway.rest.app import create_app
from gateway.rest.backend import Backend
from gateway.rest.gate import Gate
from gateway.rest.listener import HttpListener
from gateway.rest.trust import RestTrust

_log = structlog.get_logger(__name__)


class RestServer:
    """`open` (everything is refused), `admit`, `drain`, `close`: in this order, in the gateway's event loop."""

    def __init__(self, backend: Backend, address: str, trust: RestTrust, tls: ssl.SSLContext | None = None) -> None:
        self._address = address
        self._gate = Gate()
        self._listener = HttpListener(create_app(backend, self._gate, trust), address, tls)
        self.port: int | None = None

    async def open(self) -> None:
        """Open the port; ConfigurationError if it cannot be had."""
        self.port = await self._listener.open()
        host = self._address.rpartition(":")[0]
        _log.info("rest_listening", address=f"{host}:{self.port}", port=self.port)

    def admit(self) -> None:
        """Let requests in."""
        self._gate.admit()

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, and cancel what outlives `grace_s` seconds."""
        if not await self._gate.drain(grace_s):
            _log.error("http_request_ignores_cancellation")

    async def close(self) -> None:
        await self._listener.close()
