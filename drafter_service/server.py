"""The drafter's wire: protobuf in, engine calls, protobuf out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from easyspec import __version__
from easyspec.rpc import convert
from easyspec.rpc.engine_server import Engine, EngineServer, first_message, part
from easyspec.rpc.sessions import open_session
from easyspec.speculation.messages import Calibration, Draft, OpenSpeculation
from easyspec.speculation.parameters import LayerPlanRequest
from easyspec.speculation.sources import DraftSources
from easyspec.v1 import drafter_pb2, drafter_pb2_grpc


class DrafterEngine(Engine, Protocol):
    """What the server needs of an engine. `layer_plan`, the default one with nothing None, and its `layer_groups`, as
    "0 | 1-3 | 4", are valid after `start`."""

    sources: DraftSources
    layer_groups: str
    layer_plan: LayerPlanRequest

    async def open(self, request: OpenSpeculation) -> int:
        """A new session's id; raises EasyspecError subclasses, and then nothing is held."""

    async def draft(self, session_id: int, calibration: Calibration) -> Draft:
        """Commit, repair the KV cache and guess; raises EasyspecError subclasses, and then nothing has changed."""


class DrafterServer(EngineServer[DrafterEngine], drafter_pb2_grpc.DrafterServiceServicer):
    """DrafterService over an engine."""

    role = "drafter"
    service_name: str = drafter_pb2.DESCRIPTOR.services_by_name["DrafterService"].full_name

    def add_to_server(self, server: grpc.aio.Server) -> None:
        drafter_pb2_grpc.add_DrafterServiceServicer_to_server(self, server)

    async def start(self) -> None:
        await super().start()
        self.metrics.serves(self._engine.model_info, self._engine.layer_groups)

    async def Speculate(  # noqa: N802
        self, request_iterator: AsyncIterator[drafter_pb2.SpeculateRequest], context: Any
    ) -> AsyncIterator[drafter_pb2.SpeculateResponse]:
        messages = self._messages(request_iterator)
        request = await first_message(messages, convert.open_speculation_from_pb)
        async with open_session(self._engine.open(request), self._engine.close) as session_id:
            async for message in messages:
                calibration = convert.calibration_from_pb(part(message, "calibration"))
                draft = await self._engine.draft(session_id, calibration)
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
