"""The verifier's wire: protobuf in, engine calls, protobuf out."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from functools import cached_property
from typing import Any, Protocol

import grpc

from easyspec import __version__
from easyspec.rpc import convert
from easyspec.rpc.engine_server import Engine, EngineServer, first_message, part
from easyspec.rpc.sessions import open_session
from easyspec.speculation.checks import check_fingerprint
from easyspec.speculation.messages import OpenVerification, Verdict, VerifyTimings
from easyspec.speculation.token_tree import TokenTree
from easyspec.v1 import verifier_pb2, verifier_pb2_grpc


class VerifierEngine(Engine, Protocol):
    """What the server needs of an engine."""

    @property
    def row_invariant(self) -> bool:
        """Whether a token's logits are bit-identical however its row is batched; valid after `start`."""

    async def open(self, request: OpenVerification) -> int:
        """A new session's id; raises EasyspecError subclasses, and then, as when cancelled, nothing is held."""

    def verdicts(
        self, session_id: int, base_length: int, tree: TokenTree, num_plain_rounds: int
    ) -> AsyncIterator[tuple[Verdict, VerifyTimings]]:
        """The verdict on `tree`, and those of so many plain rounds behind it, fewer if one ends the output.

        Raises EasyspecError subclasses, and then nothing has changed since the verdict before.
        """


class VerifierServer(EngineServer[VerifierEngine], verifier_pb2_grpc.VerifierServiceServicer):
    """VerifierService over an engine."""

    role = "verifier"
    service_name: str = verifier_pb2.DESCRIPTOR.services_by_name["VerifierService"].full_name

    @cached_property
    def _instance_id(self) -> str:
        return uuid.uuid4().hex

    def add_to_server(self, server: grpc.aio.Server) -> None:
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(self, server)

    async def start(self) -> None:
        await super().start()
        self.metrics.serves(self._engine.model_info)

    async def Verify(  # noqa: N802
        self, request_iterator: AsyncIterator[verifier_pb2.VerifyRequest], context: Any
    ) -> AsyncIterator[verifier_pb2.VerifyResponse]:
        messages = self._messages(request_iterator)
        request = await first_message(messages, convert.open_verification_from_pb)
        check_fingerprint(request.model_fingerprint, self._engine.model_info.fingerprint)
        async with open_session(self._engine.open(request), self._engine.close) as session_id:
            async for message in messages:
                asked = convert.verify_tree_from_pb(part(message, "tree"))
                async for verdict, timings in self._engine.verdicts(session_id, *asked):
                    self.metrics.verdict(timings)
                    yield verifier_pb2.VerifyResponse(
                        verdict=convert.verdict_to_pb(verdict), timings=convert.verify_timings_to_pb(timings)
                    )

    async def GetVerifierVocabulary(  # noqa: N802
        self, request: verifier_pb2.GetVerifierVocabularyRequest, context: Any
    ) -> verifier_pb2.GetVerifierVocabularyResponse:
        vocabulary = convert.vocabulary_to_pb(await self._engine.vocabulary())
        return verifier_pb2.GetVerifierVocabularyResponse(vocabulary=vocabulary)

    async def GetVerifierInfo(  # noqa: N802
        self, request: verifier_pb2.GetVerifierInfoRequest, context: Any
    ) -> verifier_pb2.GetVerifierInfoResponse:
        return verifier_pb2.GetVerifierInfoResponse(
            model=convert.model_info_to_pb(self._engine.model_info),
            kv=convert.kv_usage_to_pb(self._engine.kv_usage()),
            max_tree_nodes=self._engine.max_tree_nodes,
            row_invariant=self._engine.row_invariant,
            version=__version__,
            instance_id=self._instance_id,
        )
