"""What a serving process runs: the base class of the three roles' servers."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import grpc

from easyspec.telemetry.metrics import RoleMetrics
from easyspec.telemetry.tracing import Tracing


class Application(ABC):
    """A gRPC service and what its process needs besides; all of it runs in the process's one event loop.

    What only some roles need does nothing here. `service_name` is the full protobuf name, for health and reflection.
    `rpc_tracing` None: RPCs have no spans.
    """

    service_name: str
    metrics: RoleMetrics
    rpc_tracing: Tracing | None = None
    # Reads again on SIGHUP what can change, and never raises; None: SIGHUP ends the process.
    reload: Callable[[], None] | None = None

    @abstractmethod
    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register the servicer."""

    @abstractmethod
    async def start(self) -> None:
        """Return when ready for requests; raises ConfigurationError. The port is open by then and says NOT_SERVING."""

    @abstractmethod
    async def stop(self) -> None:
        """Free everything. Called once, after the last RPC, also if `start` failed or was cancelled."""

    async def drain(self, grace_s: float) -> None:  # noqa: B027, as most have RPCs alone
        """Refuse what does not come as an RPC, cancel what outlives `grace_s` seconds, and return when none is
        left; before `stop`."""

    def authenticate(self, authorization: str | None) -> str | None:
        """The client's name by the `authorization` metadata of an RPC, None where any client may call; raises
        UnauthenticatedError."""
        return None

    async def wait_lost(self) -> None:
        """Return when the process cannot go on; otherwise never."""
        await asyncio.Event().wait()

    def part_health(self) -> Mapping[str, bool]:
        """Whether each part that may be lost by itself can be used, by the name that health checks ask for; cheap, and
        valid after `start`."""
        return {}
