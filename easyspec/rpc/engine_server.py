"""What the servers of drafter and verifier have in common: an engine's life, and the messages of a session."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import structlog

from easyspec.errors import InvalidRequestError
from easyspec.rpc.application import Application
from easyspec.rpc.sessions import TimelyMessages
from easyspec.settings import DEFAULT_SESSION_IDLE_TIMEOUT_S
from easyspec.speculation.messages import KvUsage, ModelInfo, OpenSpeculation, OpenVerification
from easyspec.telemetry.metrics import EngineMetrics
from easyspec.telemetry.tracing import Tracing


class Engine(Protocol):
    """What a server needs of either engine. Coroutines run in the server's event loop and never block it."""

    @property
    def model_info(self) -> ModelInfo:
        """Its model; valid after `start`."""

    @property
    def max_tree_nodes(self) -> int: ...

    async def start(self) -> None:
        """Load weights and warm up on the engine's thread; raises ConfigurationError."""

    async def stop(self) -> None:
        """End the engine's thread; also after a `start` that failed or was cancelled."""

    async def wait_lost(self) -> None:
        """Return when the device or another rank is lost, which no request can mend; otherwise never."""

    def kv_usage(self) -> KvUsage: ...

    async def vocabulary(self) -> Mapping[int, str]:
        """The tokenizer's entries: token id -> token; valid after `start`."""

    def close(self, session_id: int) -> None:
        """Free the session; idempotent, returns at once, also while a task of this session is under way."""


EngineT = TypeVar("EngineT", bound=Engine)
OpeningT = TypeVar("OpeningT", OpenSpeculation, OpenVerification)
MessageT = TypeVar("MessageT")


class EngineServer(Application, Generic[EngineT]):
    role: str

    def __init__(
        self,
        engine: EngineT,
        session_idle_timeout_s: float = DEFAULT_SESSION_IDLE_TIMEOUT_S,
        metrics: EngineMetrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._engine = engine
        self._session_idle_timeout_s = session_idle_timeout_s
        self._is_started = False
        self.rpc_tracing = tracing
        self.metrics: EngineMetrics = metrics or EngineMetrics(self.role)
        self.metrics.watch_usage(lambda: engine.kv_usage() if self._is_started else None)

    async def start(self) -> None:
        await self._engine.start()
        self._is_started = True

    async def stop(self) -> None:
        await self._engine.stop()
        if self.rpc_tracing is not None:
            await self.rpc_tracing.close()

    async def wait_lost(self) -> None:
        await self._engine.wait_lost()

    def _messages(self, messages: AsyncIterator[MessageT]) -> TimelyMessages[MessageT]:
        return TimelyMessages(messages, self._session_idle_timeout_s)


async def first_message(messages: AsyncIterator[Any], read: Callable[[Any], OpeningT]) -> OpeningT:
    """What opens a session; raises InvalidRequestError where the first message does not."""
    async for message in messages:
        request = read(part(message, "open", "as the first message"))
        if request.request_id:
            structlog.contextvars.bind_contextvars(request_id=request.request_id)
        return request
    raise InvalidRequestError("message", None, "open, as the first message")


def part(message: Any, name: str, when: str = "as every message after the first") -> Any:
    """The part of a message that must be set; raises InvalidRequestError."""
    if not message.HasField(name):
        raise InvalidRequestError("message", message.WhichOneof("message"), f"{name}, {when}")
    return getattr(message, name)
