"""The verifier's wire: a real server, a real channel, an engine without a model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import TypeAlias

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from easyspec import __version__
from easyspec.errors import (
    CapacityError,
    DeadlineError,
    EasyspecError,
    InvalidRequestError,
    InvalidTreeError,
    PromptTooLongError,
    StalePositionError,
    UnavailableError,
    UnknownModelError,
    WrongModelError,
)
from easyspec.rpc import convert
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import FinishReason, SamplingParameters, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from easyspec.v1 import types_pb2, verifier_pb2, verifier_pb2_grpc
from tests.fakes.engines import FakeVerifierEngine, next_token
from tests.fakes.servers import eventually, serving
from verifier_service.server import VerifierEngine, VerifierServer

Stub: TypeAlias = "verifier_pb2_grpc.VerifierServiceAsyncStub"
PROMPT = (5, 6, 7)


@pytest.fixture
async def engine() -> FakeVerifierEngine:
    return FakeVerifierEngine("base")


@pytest.fixture
async def stub(engine: FakeVerifierEngine) -> AsyncIterator[Stub]:
    conforming: VerifierEngine = engine
    async with serving(VerifierServer(conforming)) as address, open_channel(address) as channel:
        yield verifier_pb2_grpc.VerifierServiceStub(channel)


def opening(**changes: object) -> verifier_pb2.VerifyRequest:
    fields = {"prompt_token_ids": PROMPT, "sampling": SamplingParameters(seed=1), "stop": StopConditions()} | changes
    return verifier_pb2.VerifyRequest(open=convert.open_verification_to_pb(OpenVerification(**fields)))


def asking(base_length: int, tree: TokenTree = EMPTY_TREE) -> verifier_pb2.VerifyRequest:
    return verifier_pb2.VerifyRequest(tree=convert.verify_tree_to_pb(base_length, tree))


async def outcome(stub: Stub, *requests: verifier_pb2.VerifyRequest) -> grpc.aio.AioRpcError:
    """How a stream of `requests` fails."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        _ = [response async for response in stub.Verify(iter(requests), timeout=5)]
    return failure.value


async def test_answers_every_tree_with_a_verdict_and_frees_the_session(stub: Stub, engine: FakeVerifierEngine) -> None:
    first = next_token(PROMPT, 100)
    second = next_token((*PROMPT, first), 100)
    call = stub.Verify(timeout=5)
    await call.write(opening(stop=StopConditions(max_tokens=4)))
    await call.write(asking(3, TokenTree((first, first + 1, second), (0, 0, 1))))
    response = await call.read()
    verdict = convert.verdict_from_pb(response.verdict)
    assert verdict.base_length == 3
    assert verdict.token_ids[:2] == (first, second)
    assert verdict.accepted_rows == (1, 3)
    assert verdict.finish_reason is None
    assert convert.verify_timings_from_pb(response.timings).num_batch_rows == 4
    await call.write(asking(6))
    verdict = convert.verdict_from_pb((await call.read()).verdict)
    assert len(verdict.token_ids) == 1
    assert verdict.finish_reason is FinishReason.LENGTH
    assert engine.kv_usage().num_sessions == 1
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert engine.kv_usage().num_sessions == 0


async def test_info_tells_model_memory_and_limits(stub: Stub, engine: FakeVerifierEngine) -> None:
    info = await stub.GetVerifierInfo(verifier_pb2.GetVerifierInfoRequest(), timeout=5)
    assert convert.model_info_from_pb(info.model) == engine.model_info
    assert convert.kv_usage_from_pb(info.kv) == engine.kv_usage()
    assert (info.max_tree_nodes, info.row_invariant, info.version) == (16, True, __version__)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (InvalidRequestError("sampling.top_k", 0, "at least 1"), grpc.StatusCode.INVALID_ARGUMENT),
        (InvalidTreeError("tree.parent_rows[2]", 9, "0 to 2"), grpc.StatusCode.INVALID_ARGUMENT),
        (PromptTooLongError("prompt_token_ids", "9 tokens", "8"), grpc.StatusCode.OUT_OF_RANGE),
        (UnknownModelError("other", "base"), grpc.StatusCode.NOT_FOUND),
        (StalePositionError(3, 4), grpc.StatusCode.FAILED_PRECONDITION),
        (CapacityError("no KV memory", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (UnavailableError("the engine has gone"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineError("too late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
@pytest.mark.parametrize("where", ["open", "verify"])
async def test_engine_errors_become_statuses_and_come_back(
    stub: Stub, engine: FakeVerifierEngine, fault: EasyspecError, code: grpc.StatusCode, where: str
) -> None:
    engine.open_fault = fault if where == "open" else None
    engine.step_fault = fault if where == "verify" else None
    # grpc.aio may put a status of its own over the server's if a message meets a dying stream: send none.
    requests = [opening()] if where == "open" else [opening(), asking(3)]
    error = await outcome(stub, *requests)
    assert error.code() is code
    assert error.details() == str(fault)
    returned = error_from_rpc(error)
    assert type(returned) is type(fault)
    assert str(returned) == str(fault)
    assert returned.__dict__.keys() == fault.__dict__.keys()
    await eventually(lambda: engine.kv_usage().num_sessions == 0)


async def test_errors_carry_google_rpc_details(stub: Stub, engine: FakeVerifierEngine) -> None:
    error = await outcome(stub, opening(sampling=SamplingParameters(seed=1, temperature=-1.0)))
    status = rpc_status.from_call(error)
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad_request)
    assert (info.domain, info.reason) == ("easyspec", "INVALID_REQUEST")
    assert bad_request.field_violations[0].field == "sampling.temperature"
    assert "-1.0" in bad_request.field_violations[0].description

    engine.open_fault = CapacityError("full", retry_after_s=1.5)
    status = rpc_status.from_call(await outcome(stub, opening()))
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1500


def seedless() -> verifier_pb2.VerifyRequest:
    request = opening()
    request.open.sampling.ClearField("seed")
    return request


@pytest.mark.parametrize(
    ("requests", "field", "shown"),
    [
        ([], "message", "None"),
        ([verifier_pb2.VerifyRequest()], "message", "None"),
        ([asking(3)], "message", "'tree'"),
        ([opening(), opening()], "message", "'open'"),
        ([opening(), verifier_pb2.VerifyRequest()], "message", "None"),
        ([opening(), verifier_pb2.VerifyRequest(tree=verifier_pb2.VerifyTree(base_length=3))], "tree.tree", "None"),
        ([seedless()], "sampling.seed", "None"),
        ([verifier_pb2.VerifyRequest(open=verifier_pb2.OpenVerification())], "sampling.seed", "None"),
    ],
)
async def test_a_stream_out_of_order_is_refused(
    stub: Stub, engine: FakeVerifierEngine, requests: list[verifier_pb2.VerifyRequest], field: str, shown: str
) -> None:
    error = await outcome(stub, *requests)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    returned = error_from_rpc(error)
    assert isinstance(returned, InvalidRequestError)
    assert (returned.field, repr(returned.value)) == (field, shown)
    await eventually(lambda: engine.kv_usage().num_sessions == 0)


async def test_a_bad_message_touches_no_other_stream(stub: Stub, engine: FakeVerifierEngine) -> None:
    healthy = stub.Verify(timeout=5)
    await healthy.write(opening())
    await healthy.write(asking(3))
    await healthy.read()
    not_a_tree = types_pb2.TokenTree(token_ids=[1], parent_rows=[5])
    bad = verifier_pb2.VerifyRequest(tree=verifier_pb2.VerifyTree(base_length=3, tree=not_a_tree))
    assert (await outcome(stub, opening(), bad)).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await outcome(stub, opening(), asking(2))).code() is grpc.StatusCode.FAILED_PRECONDITION
    await healthy.write(asking(4))
    assert (await healthy.read()).verdict.base_length == 4
    assert engine.kv_usage().num_sessions == 1
    await healthy.done_writing()
    assert await healthy.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("busy", ["opening", "idle", "verifying"])
@pytest.mark.parametrize("how", ["cancel", "deadline", "disconnect"])
async def test_a_client_that_goes_away_frees_its_session(busy: str, how: str) -> None:
    engine = FakeVerifierEngine("base")
    async with serving(VerifierServer(engine)) as address:
        channel = open_channel(address)
        call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(timeout=0.2 if how == "deadline" else 5)
        if busy == "opening":
            engine.open_gate.clear()
        await call.write(opening())
        await eventually(lambda: "open" in engine.events)
        if busy != "opening":
            await eventually(lambda: engine.kv_usage().num_sessions == 1)
        if busy == "verifying":
            engine.step_gate.clear()
            await call.write(asking(3))
            await eventually(lambda: "step" in engine.events)
        if how == "cancel":
            call.cancel()
        if how == "disconnect":
            await channel.close()
        # A session that is not open yet is given up, and so is its place in the queue for memory.
        await eventually(lambda: ("withdraw" if busy == "opening" else "close") in engine.events)
        assert engine.kv_usage().num_sessions == 0
        await channel.close()


@pytest.mark.parametrize("says", ["nothing", "open"])
async def test_a_client_that_says_nothing_frees_its_session(says: str) -> None:
    engine = FakeVerifierEngine("base")
    async with (
        serving(VerifierServer(engine, session_idle_timeout_s=0.1)) as address,
        open_channel(address) as channel,
    ):
        call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(timeout=5)
        if says == "open":
            await call.write(opening())
            await eventually(lambda: engine.kv_usage().num_sessions == 1)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert "sent nothing" in await call.details()
        assert engine.kv_usage().num_sessions == 0


async def test_a_session_for_another_model_is_refused_here_and_holds_nothing(
    stub: Stub, engine: FakeVerifierEngine
) -> None:
    engine.model_info = replace(engine.model_info, fingerprint="0e11")
    error = error_from_rpc(await outcome(stub, opening(model_fingerprint="07h")))
    assert isinstance(error, WrongModelError)
    assert "open" not in engine.events
    for fingerprint in ("0e11", ""):
        call = stub.Verify(timeout=5)
        await call.write(opening(model_fingerprint=fingerprint))
        await call.write(asking(3))
        assert (await call.read()).verdict.token_ids
        call.cancel()
