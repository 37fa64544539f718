"""Sessions at the verifier and the drafter as gRPC streams: one message each way per round."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeAlias, TypeVar

import grpc

from easyspec.errors import ConnectionLostError, EasyspecError, UnavailableError
from easyspec.rpc.channels import request_metadata
from easyspec.rpc.convert import (
    calibration_to_pb,
    draft_from_pb,
    kv_usage_from_pb,
    model_info_from_pb,
    open_speculation_to_pb,
    open_verification_to_pb,
    verdict_from_pb,
    verify_timings_from_pb,
    verify_tree_to_pb,
    vocabulary_from_pb,
)
from easyspec.rpc.errors import error_from_rpc
from easyspec.speculation.messages import Calibration, Draft, OpenSpeculation, OpenVerification
from easyspec.speculation.token_tree import TokenTree
from easyspec.v1 import drafter_pb2, drafter_pb2_grpc, verifier_pb2, verifier_pb2_grpc
from gateway.decode_loop import TimedVerdict
from gateway.peers.peer import PeerInfo

_NO_STATUS_YET = (grpc.StatusCode.INTERNAL, "Internal error from Core")
_STATUS_POLL_S = 0.01
_MAX_STATUS_POLLS = 50

_VerifyCall: TypeAlias = "grpc.aio.StreamStreamCall[verifier_pb2.VerifyRequest, verifier_pb2.VerifyResponse]"
_SpeculateCall: TypeAlias = "grpc.aio.StreamStreamCall[drafter_pb2.SpeculateRequest, drafter_pb2.SpeculateResponse]"
_RequestT = TypeVar("_RequestT")
_ResponseT = TypeVar("_ResponseT")


class VerifierClient:
    """Talks to the verifier over `channel`, which the caller owns."""

    service_name: str = verifier_pb2.DESCRIPTOR.services_by_name["VerifierService"].full_name

    def __init__(self, channel: grpc.aio.Channel, info_timeout_s: float) -> None:
        self._stub: verifier_pb2_grpc.VerifierServiceAsyncStub = verifier_pb2_grpc.VerifierServiceStub(channel)
        self._info_timeout_s = info_timeout_s

    async def info(self) -> PeerInfo:
        """What the service says of itself; EasyspecError if it does not answer in time."""
        request = verifier_pb2.GetVerifierInfoRequest()
        response = await _answered(self._stub.GetVerifierInfo(request, timeout=self._info_timeout_s))
        model, kv = model_info_from_pb(response.model), kv_usage_from_pb(response.kv)
        return PeerInfo(model, response.max_tree_nodes, kv, response.instance_id)

    async def vocabulary(self) -> dict[int, str]:
        """Its tokenizer's entries, token id -> token; EasyspecError if it does not tell."""
        request = verifier_pb2.GetVerifierVocabularyRequest()
        response = await _answered(self._stub.GetVerifierVocabulary(request, timeout=self._info_timeout_s))
        return vocabulary_from_pb(response.vocabulary)

    @contextlib.asynccontextmanager
    async def open(self, opening: OpenVerification, timeout_s: float) -> AsyncIterator[VerifierStream]:
        """A session that must be over in `timeout_s` seconds; it is cancelled on exit."""
        call = self._stub.Verify(timeout=timeout_s, metadata=request_metadata(opening.request_id))
        try:
            await _write(call, verifier_pb2.VerifyRequest(open=open_verification_to_pb(opening)))
            yield VerifierStream(call)
        finally:
            call.cancel()


class VerifierStream:
    """An open session at the verifier."""

    def __init__(self, call: _VerifyCall) -> None:
        self._call = call
        self._num_coming = 0  # verdicts that were asked for before their turn
        self._last_ns = 0

    async def verify(self, base_length: int, tree: TokenTree, num_plain_rounds: int) -> TimedVerdict:
        if self._num_coming > 0:
            started_ns = self._last_ns
            self._num_coming -= 1
        else:
            started_ns = time.monotonic_ns()
            message = verify_tree_to_pb(base_length, tree, num_plain_rounds)
            await _write(self._call, verifier_pb2.VerifyRequest(tree=message))
            self._num_coming = num_plain_rounds
        response = await _read(self._call)
        self._last_ns = time.monotonic_ns()
        return TimedVerdict(
            verdict_from_pb(response.verdict), verify_timings_from_pb(response.timings), self._last_ns - started_ns
        )


class DrafterClient:
    """Talks to the drafter over `channel`, which the caller owns; no session outlives `session_timeout_s` seconds."""

    service_name: str = drafter_pb2.DESCRIPTOR.services_by_name["DrafterService"].full_name

    def __init__(self, channel: grpc.aio.Channel, info_timeout_s: float, session_timeout_s: float) -> None:
        self._stub: drafter_pb2_grpc.DrafterServiceAsyncStub = drafter_pb2_grpc.DrafterServiceStub(channel)
        self._info_timeout_s = info_timeout_s
        self._session_timeout_s = session_timeout_s

    async def info(self) -> PeerInfo:
        """What the service says of itself; EasyspecError if it does not answer in time."""
        request = drafter_pb2.GetDrafterInfoRequest()
        response = await _answered(self._stub.GetDrafterInfo(request, timeout=self._info_timeout_s))
        return PeerInfo(model_info_from_pb(response.model), response.max_tree_nodes, kv_usage_from_pb(response.kv))

    async def vocabulary(self) -> dict[int, str]:
        """Its tokenizer's entries, token id -> token; EasyspecError if it does not tell."""
        request = drafter_pb2.GetDrafterVocabularyRequest()
        response = await _answered(self._stub.GetDrafterVocabulary(request, timeout=self._info_timeout_s))
        return vocabulary_from_pb(response.vocabulary)

    def open(self, opening: OpenSpeculation) -> DrafterStream:
        """A session; returns at once, while the drafter is told the prompt in the background."""
        call = self._stub.Speculate(timeout=self._session_timeout_s, metadata=request_metadata(opening.request_id))
        return DrafterStream(call, opening)


class DrafterStream:
    """An open session at the drafter; see `gateway.peers.draft_session.DraftStream`."""

    def __init__(self, call: _SpeculateCall, opening: OpenSpeculation) -> None:
        self._call = call
        self.committed_length = len(opening.prompt_token_ids)
        request = drafter_pb2.SpeculateRequest(open=open_speculation_to_pb(opening))
        self._opened = asyncio.create_task(_write(call, request))
        # If no draft is asked for any more, an error that was not read is noise in the log.
        self._opened.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def draft(self, calibration: Calibration) -> Draft:
        await self._opened
        await _write(self._call, drafter_pb2.SpeculateRequest(calibration=calibration_to_pb(calibration)))
        draft = draft_from_pb(await _read(self._call))
        self.committed_length += len(calibration.token_ids)
        return draft

    def cancel(self) -> None:
        self._opened.cancel()
        self._call.cancel()


async def _answered(call: Awaitable[_ResponseT]) -> _ResponseT:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


async def _write(call: grpc.aio.StreamStreamCall[_RequestT, _ResponseT], request: _RequestT) -> None:
    try:
        await call.write(request)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the latter if the peer had ended the stream before
        raise await _end_of(call) from None


async def _read(call: grpc.aio.StreamStreamCall[_RequestT, _ResponseT]) -> _ResponseT:
    try:
        response = await call.read()
    except grpc.aio.AioRpcError:
        raise await _end_of(call) from None
    if response is grpc.aio.EOF:
        raise await _end_of(call)
    return response  # type: ignore[return-value]


async def _end_of(call: grpc.aio.StreamStreamCall[Any, Any]) -> EasyspecError:
    """Why the session is over, as the peer said it.

    gRPC gives a message that meets a dying stream a status of its own making, and puts the peer's in its place as
    soon as that has arrived: worth waiting for, as it tells a refused prompt from a lost connection.
    """
    for _ in range(_MAX_STATUS_POLLS):
        code, details = await call.code(), await call.details()
        if (code, details) != _NO_STATUS_YET:
            break
        await asyncio.sleep(_STATUS_POLL_S)
    else:
        return ConnectionLostError("the connection to the service was lost")
    if code is grpc.StatusCode.OK:
        return UnavailableError("the service ended the session")
    metadata = await call.initial_metadata(), await call.trailing_metadata()
    return error_from_rpc(grpc.aio.AioRpcError(code, *metadata, details))
