"""The verifier's wire: protobuf in, engine calls, protobuf out."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import grpc
import structlog

from easyspec import __version__
from easyspec.errors import InvalidRequestError
from easyspec.rpc import convert
from easyspec.rpc.sessions import TimelyMessages, open_session
from easyspec.rpc.settings import DEFAULT_SESSION_IDLE_TIMEOUT_S
from easyspec.speculation.checks import check_fingerprint
from easyspec.speculation.messages import KvUsage, ModelInfo, OpenVerification, Verdict, VerifyTimings
from easyspec.speculation.token_tree import TokenTree
from easyspec.telemetry.metrics import EngineMetrics
from easyspec.telemetry.tracing import Tracing
from easyspec.v1 import verifier_pb2, verifier_pb2_grpc


class VerifierEngine(Protocol):
    """What the server needs of an engine. Coroutines run in the server's event loop and never block it."""

    @property
    def model_info(self) -> ModelInfo:
        """The base model; valid after `start`."""

    @property
    def max_tree_nodes(self) -> int: ...

    @property
    def row_invariant(self) -> bool:
        """Whether a token's logits are bit-identical however its row is batched; valid after `start`."""

    async def start(self) -> None:
        """Load weights and warm up on the engine's thread; raises ConfigurationError."""

    async def stop(self) -> None:
        """End the engine's thread; also after a `start` that failed or was cancelled."""

    async def wait_lost(self) -> None:
        """Return when the device or another rank is lost, which no request can mend; otherwise never."""

    def kv_usage(self) -> KvUsage: ...

    async def vocabulary(self) -> Mapping[int, str]:
        """The tokenizer's entries: token id -> token; valid after `start`."""

    async def open(self, request: OpenVerification) -> int:
        """A new session's id; raises EasyspecError subclasses, and then, as when cancelled, nothing is held."""

    def verdicts(
        self, session_id: int, base_length: int, tree: TokenTree, num_plain_rounds: int
    ) -> AsyncIterator[tuple[Verdict, VerifyTimings]]:
        """The verdict on `tree`, and those of so many plain rounds behind it, fewer if one ends the output.

        Raises EasyspecError subclasses, and then nothing has changed since the verdict before.
        """

    def close(self, session_id: int) -> None:
        """Free the session; idempotent, returns at once, also while verdicts of this session are under way."""


class VerifierServer(verifier_pb2_grpc.VerifierServiceServicer):
    """VerifierService over an engine; an Application of `easyspec.rpc.lifecycle`."""

    service_name: str = verifier_pb2.DESCRIPTOR.services_by_name["VerifierService"].full_name

    def __init__(
        self,
        engine: VerifierEngine,
        session_idle_timeout_s: float = DEFAULT_SESSION_IDLE_TIMEOUT_S,
        metrics: EngineMetrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._engine = engine
        self._session_idle_timeout_s = session_idle_timeout_s
        self._is_started = False
        self._instance_id = uuid.uuid4().hex
        self.rpc_tracing = tracing
        self.metrics = metrics or EngineMetrics("verifier")
        self.metrics.watch_usage(lambda: engine.kv_usage() if self._is_started else None)

    def add_to_server(self, server: grpc.aio.Server) -> None:
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(self, server)

    async def start(self) -> None:
        await self._engine.start()
        self.metrics.serves(self._engine.model_info)
        self._is_started = True

    async def stop(self) -> None:
        await self._engine.stop()
        if self.rpc_tracing is not None:
            await self.rpc_tracing.close()

    async def wait_lost(self) -> None:
        await self._engine.wait_lost()

    async def Verify(  # noqa: N802
        self, request_iterator: AsyncIterator[verifier_pb2.VerifyRequest], context: Any
    ) -> AsyncIterator[verifier_pb2.VerifyResponse]:
        messages = TimelyMessages(request_iterator, self._session_idle_timeout_s)
        request = await _opening(messages)
        check_fingerprint(request.model_fingerprint, self._engine.model_info.fingerprint)
        async with open_session(self._engine.open(request), self._engine.close) as session_id:
            async for message in messages:
                async for verdict, timings in self._engine.verdicts(session_id, *_tree(message)):
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


async def _opening(messages: AsyncIterator[verifier_pb2.VerifyRequest]) -> OpenVerification:
    async for message in messages:
        if not message.HasField("open"):
            raise InvalidRequestError("message", message.WhichOneof("message"), "open, as the first message")
        request = convert.open_verification_from_pb(message.open)
        if request.request_id:
            structlog.contextvars.bind_contextvars(request_id=request.request_id)
        return request
    raise InvalidRequestError("message", None, "open, as the first message")


def _tree(message: verifier_pb2.VerifyRequest) -> tuple[int, TokenTree, int]:
    if not message.HasField("tree"):
        raise InvalidRequestError("message", message.WhichOneof("message"), "tree, as every message after the first")
    return convert.verify_tree_from_pb(message.tree)
