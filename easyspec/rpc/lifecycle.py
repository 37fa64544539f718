"""The life of a serving process: listen, load, serve, drain, stop. The same for every role."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import grpc
import structlog
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from easyspec.errors import ConfigurationError, EngineLostError
from easyspec.free_memory import settle_memory
from easyspec.parallel.launch import EXIT_LOST, die_with_launcher, is_follower
from easyspec.rpc.application import Application
from easyspec.rpc.channels import MAX_MESSAGE_BYTES
from easyspec.rpc.interceptors import RpcBoundary
from easyspec.rpc.readiness import tell_ready
from easyspec.rpc.tls import ServerCertificates
from easyspec.settings import ServerSettings, load_settings
from easyspec.telemetry.logs import configure_logging
from easyspec.telemetry.metrics_server import MetricsServer
from easyspec.tls import ServerTls

EXIT_CONFIGURATION = 2

# After the last RPC: time for its status to reach the client, while health watchers hold their streams open.
_FLUSH_GRACE_S = 0.2
# A cancelled RPC frees what it holds at once; one that does not in this time is a bug, and no reason to hang.
_CANCEL_GRACE_S = 5.0
# How soon the health of a part is told; setting it anew costs microseconds.
_PARTS_POLL_S = 0.5
_SERVER_OPTIONS = (
    # Two servers must not share a port by accident, which is gRPC's default.
    ("grpc.so_reuseport", 0),
    # Clients ping: every 30 s, also during a long prefill, and beside data, to learn what the connection can carry. The
    # default rules take what comes in a pause for abuse and end the connection with every stream on it ("Too many
    # pings"), a machine short of CPU time being enough. What is queued for a peer that floods is bounded without them.
    ("grpc.http2.max_ping_strikes", 0),
    # Clients look names up when they connect, and at no other time: only so do they find replicas that were added.
    # Streams that are open go on over the old connection until they end.
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

_SettingsT = TypeVar("_SettingsT", bound=ServerSettings)
_log = structlog.get_logger(__name__)


class RpcServer:
    """One gRPC server with health, reflection and our RpcBoundary; made and used inside the running event loop."""

    def __init__(
        self, application: Application, address: str, tls: ServerTls | None = None, reflection: bool = True
    ) -> None:
        self._application = application
        self._address = address
        self._certificates = ServerCertificates(tls) if tls is not None else None
        self._has_reflection = reflection
        self.is_serving = False
        self._boundary = RpcBoundary(
            "loading: try again later", application.authenticate, application.metrics, application.rpc_tracing
        )
        self._health = health.aio.HealthServicer()
        self._parts_watch: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(options=_SERVER_OPTIONS, interceptors=(self._boundary,))

    async def listen(self) -> int:
        """Open the port and return it; health says NOT_SERVING. Raises ConfigurationError if it cannot be had."""
        _check_bindable(self._address)
        # The health servicer starts out as SERVING.
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._application.add_to_server(self._server)
        if self._has_reflection:
            names = (self._application.service_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        try:
            if self._certificates is None:
                port = self._server.add_insecure_port(self._address)
            else:
                port = self._server.add_secure_port(self._address, self._certificates.grpc_credentials())
        except RuntimeError as error:
            raise ConfigurationError(f"address is {self._address!r}: cannot listen there: {error}") from None
        await self._server.start()
        return port

    async def start(self) -> None:
        """Start the application, then let RPCs in and say SERVING."""
        await self._application.start()
        # Admitted before SERVING is said: a client that sees SERVING must not be refused.
        self._boundary.admit()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        await self._tell_parts()

        async def watch_parts() -> None:
            while True:
                await asyncio.sleep(_PARTS_POLL_S)
                await self._tell_parts()

        self._parts_watch = asyncio.create_task(watch_parts())

    async def drain(self, grace_s: float) -> None:
        """Say NOT_SERVING, refuse new RPCs, cancel what outlives `grace_s` seconds, stop the application.

        It waits for no RPC once the application is lost.
        """
        self.is_serving = False
        if self._parts_watch is not None:
            await _cancelled(self._parts_watch)
        # The other way round here: first the health check turns clients away, then RPCs are refused.
        await self._health.enter_graceful_shutdown()
        self._boundary.refuse("draining: this replica is going away")
        # Waiting here and not in server.stop: that one would also wait for health watchers, which never end.
        finishing = asyncio.ensure_future(self._finish(grace_s))
        losing = asyncio.ensure_future(self._application.wait_lost())
        try:
            await asyncio.wait((finishing, losing), return_when=asyncio.FIRST_COMPLETED)
            is_idle = finishing.done() and finishing.result()
        finally:
            await _cancelled(finishing, losing)
        await self._server.stop(_FLUSH_GRACE_S if is_idle else 0)
        if not await self._boundary.wait_idle(_CANCEL_GRACE_S):
            _log.error("rpc_ignores_cancellation")
        # Last: RPCs that were cancelled free their sessions at the application.
        await self._application.stop()

    async def _finish(self, grace_s: float) -> bool:
        """Let what is running end; False if something outlived `grace_s`."""
        is_idle, _ = await asyncio.gather(self._boundary.wait_idle(grace_s), self._application.drain(grace_s))
        return is_idle

    async def _tell_parts(self) -> None:
        states = health_pb2.HealthCheckResponse
        for name, is_usable in self._application.part_health().items():
            await self._health.set(name, states.SERVING if is_usable else states.NOT_SERVING)

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        self.is_serving = status == health_pb2.HealthCheckResponse.SERVING
        for name in ("", self._application.service_name):
            await self._health.set(name, status)


async def serve(application: Application, settings: ServerSettings, stopping: asyncio.Event) -> None:
    """Serve `application` until `stopping` is set, then drain. Raises what `application.start` raises, and
    EngineLostError, without draining, if the application cannot go on."""
    server = RpcServer(application, settings.address, settings.server_tls, settings.reflection)
    metrics_server = await _serve_metrics(application, server, settings)
    port = await server.listen()
    host = settings.address.rpartition(":")[0]
    _log.info("listening", address=f"{host}:{port}", port=port)
    starting = asyncio.ensure_future(server.start())
    stop_waiter = asyncio.ensure_future(stopping.wait())
    lost_waiter = asyncio.ensure_future(application.wait_lost())
    grace_s = settings.drain_grace_s
    try:
        await asyncio.wait((starting, stop_waiter), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            settle_memory()
            _log.info("serving", address=f"{host}:{port}", port=port)
            tell_ready()
            await asyncio.wait((stop_waiter, lost_waiter), return_when=asyncio.FIRST_COMPLETED)
        if lost_waiter.done():
            lost_waiter.result()
        else:
            _log.info("draining", grace_s=grace_s)
    finally:
        await _cancelled(starting, stop_waiter)
        await server.drain(grace_s)
        is_lost = lost_waiter.done()
        await _cancelled(lost_waiter)
        if metrics_server is not None:
            await metrics_server.close()
    if is_lost:
        raise EngineLostError("the device or another rank is lost")
    _log.info("stopped")


async def _serve_metrics(application: Application, server: RpcServer, settings: ServerSettings) -> MetricsServer | None:
    """Open the port of the settings, if there is one: before the model is loaded, so that loading can be watched."""
    if settings.metrics_address is None:
        return None
    tls = ServerCertificates(settings.server_tls).ssl_context() if settings.server_tls is not None else None
    metrics_server = MetricsServer(application.metrics, lambda: server.is_serving, tls)
    port = await metrics_server.listen(settings.metrics_address)
    _log.info("metrics", address=f"{settings.metrics_address.rpartition(':')[0]}:{port}", port=port)
    return metrics_server


def run_role(
    role: str,
    settings_type: type[_SettingsT],
    build: Callable[[_SettingsT], Application],
    arguments: Sequence[str] | None = None,
    follow: Callable[[_SettingsT], None] | None = None,
) -> int:
    """A whole process: settings, logs, application, service until SIGTERM or SIGINT. Returns the exit code.

    A ConfigurationError is one line on stderr and exit code 2, EngineLostError one event and exit code 3. A second
    signal ends the process without draining. Under torchrun only rank 0 serves; the others `follow` until it dismisses
    them, whatever signals they get.
    """
    # Read when the model library is first imported, which is later: idle threads of the computation must sleep, not
    # spin, as roles may share cores (beside other load spinning made a pass of 0.3 B parameters 5 to 12 times slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    die_with_launcher()
    try:
        settings = load_settings(settings_type, sys.argv[1:] if arguments is None else arguments)
        configure_logging(role, settings.log_format, level=settings.log_level)
        if follow is not None and is_follower():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            follow(settings)
        else:
            uvloop.run(_serve_until_signal(build(settings), settings))
    except ConfigurationError as error:
        print(f"{role}: {error}", file=sys.stderr)
        return EXIT_CONFIGURATION
    except EngineLostError as error:
        _log.error("lost", reason=str(error))
        return EXIT_LOST
    return 0


async def _serve_until_signal(application: Application, settings: ServerSettings) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def stop_once() -> None:
        stopping.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_once)
    if application.reload is not None:
        loop.add_signal_handler(signal.SIGHUP, application.reload)
    await serve(application, settings, stopping)


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _check_bindable(address: str) -> None:
    """Raise ConfigurationError with the system's reason; gRPC's own attempt says less, and prints to stderr."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen()
    except OSError as error:
        raise ConfigurationError(f"address is {address!r}: cannot listen there: {error.strerror or error}") from None
