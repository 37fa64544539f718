"""The drafter's wire: protobuf in, engine calls, protobuf out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import grpc
import structlog

from easyspec import __version__
from easyspec.errors import InvalidRequestError
from easyspec.rpc import convert
from easyspec.rpc.sessions import TimelyMessages, open_session
from easyspec.rpc.settings import DEFAULT_SESSION_IDLE_TIMEOUT_S
from easyspec.speculation.messages import Calibration, Draft, KvUsage, ModelInfo, OpenSpeculation
from easyspec.speculation.parameters import LayerPlanRequest
from easyspec.speculation.sources import DraftSources
from easyspec.telemetry.metrics import EngineMetrics
from easyspec.telemetry.tracing import Tracing
from easyspec.v1 import drafter_pb2, drafter_pb2_grpc


class DrafterEngine(Protocol):
    """What the server needs of an engine. Coroutines run in the server's event loop and never block it."""

    @property
    def model_info(self) -> ModelInfo:
        """The draft model; valid after `start`."""

    @property
    def max_tree_nodes(self) -> int: ...

    @property
    def sources(self) -> DraftSources:
        """Who guesses here."""

    @property
    def layer_groups(self) -> str:
        """Layer groups of the default plan, as "0 | 1-3 | 4"; valid after `start`."""

    @property
    def layer_plan(self) -> LayerPlanRequest:
        """The default plan, nothing None; valid after `start`."""

    async def start(self) -> None:
        """Load weights and warm up on the engine's thread; raises ConfigurationError."""

    async def stop(self) -> None:
        """End the engine's thread; also after a `start` that failed or was cancelled."""

    async def wait_lost(self) -> None:
        """Return when the device or another rank is lost, which no request can mend; otherwise never."""

    def kv_usage(self) -> KvUsage: ...

    async def vocabulary(self) -> Mapping[int, str]:
        """The tokenizer's entries: token id -> token; valid after `start`."""

    async def open(self, request: OpenSpeculation) -> int:
        """A new session's id; raises EasyspecError subclasses, and then nothing is held."""

    async def draft(self, session_id: int, calibration: Calibration) -> Draft:
        """Commit, repair the KV cache and guess; raises EasyspecError subclasses, and then nothing has changed."""

    def close(self, session_id: int) -> None:
        """Free the session; idempotent, returns at once, also while `draft` of this session is under way."""


class DrafterServer(drafter_pb2_grpc.DrafterServiceServicer):
    """DrafterService over an engine; an Application of `easyspec.rpc.lifecycle`."""

    service_name: str = drafter_pb2.DESCRIPTOR.services_by_name["DrafterService"].full_name

    def __init__(
        self,
        engine: DrafterEngine,
        session_idle_timeout_s: float = DEFAULT_SESSION_IDLE_TIMEOUT_S,
        metrics: EngineMetrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._engine = engine
        self._session_idle_timeout_s = session_idle_timeout_s
        self._is_started = False
        self.rpc_tracing = tracing
        self.metrics = metrics or EngineMetrics("drafter")
        self.metrics.watch_usage(lambda: engine.kv_usage() if self._is_started else None)

    def add_to_server(self, server: grpc.aio.Server) -> None:
        drafter_pb2_grpc.add_DrafterServiceServicer_to_server(self, server)

    async def start(self) -> None:
        await self._engine.start()
        self.metrics.serves(self._engine.model_info, self._engine.layer_groups)
        self._is_started = True

    async def stop(self) -> None:
        await self._engine.stop()
        if self.rpc_tracing is not None:
            await self.rpc_tracing.close()

    async def wait_lost(self) -> None:
        await self._engine.wait_lost()

    async def Speculate(  # noqa: N802
        self, request_iterator: AsyncIterator[drafter_pb2.SpeculateRequest], context: Any
    ) -> AsyncIterator[drafter_pb2.SpeculateResponse]:
        messages = TimelyMessages(request_iterator, self._session_idle_timeout_s)
        request = await _opening(messages)
        async with open_session(self._engine.open(request), self._engine.close) as session_id:
            async for message in messages:
                draft = await self._engine.draft(session_id, _calibration(message))
                self.metrics.draft(draft.timings)
                yield convert.draft_to_pb(draft)

    async def GetDrafterVocabulary(  # noqa: N802
        self, request: drafter_pb2.GetDrafterVocabularyRequest, context: Any
    ) -> drafter_pb2.GetDrafterVocabularyResponse:
        vocabulary = convert.vocabulary_to_pb(await self._engine.vocabulary())
        return drafter_pb2.GetDrafterVocabularyResponse(vocabulary=vocabulary)

    async def GetDrafterInfo(  # noqa: N802
        self, request: drafter_pb2.GetDrafterInfoRequest, context: Any
    ) -> drafter_pb2.GetDrafterInfoResponse:
        return drafter_pb2.GetDrafterInfoResponse(
            model=convert.model_info_to_pb(self._engine.model_info),
            kv=convert.kv_usage_to_pb(self._engine.kv_usage()),
            layer_groups=self._engine.layer_groups,
            layer_plan=convert.layer_plan_to_pb(self._engine.layer_plan),
            max_tree_nodes=self._engine.max_tree_nodes,
            version=__version__,
            sources=convert.sources_to_pb(self._engine.sources),
        )


async def _opening(messages: AsyncIterator[drafter_pb2.SpeculateRequest]) -> OpenSpeculation:
    async for message in messages:
        if not message.HasField("open"):
            raise InvalidRequestError("message", message.WhichOneof("message"), "open, as the first message")
        request = convert.open_speculation_from_pb(message.open)
        if request.request_id:
            structlog.contextvars.bind_contextvars(request_id=request.request_id)
        return request
    raise InvalidRequestError("message", None, "open, as the first message")


def _calibration(message: drafter_pb2.SpeculateRequest) -> Calibration:
    if not message.HasField("calibration"):
        raise InvalidRequestError(
            "message", message.WhichOneof("message"), "calibration, as every message after the first"
        )
    return convert.calibration_from_pb(message.calibration)
