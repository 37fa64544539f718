"""What every RPC of ours gets without asking: a request id, honest statuses, one event."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from easyspec.rpc import convert
from easyspec.rpc.channels import open_channel, request_metadata
from easyspec.rpc.interceptors import RpcBoundary
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.telemetry.metrics import RoleMetrics
from easyspec.v1 import types_pb2, verifier_pb2, verifier_pb2_grpc
from tests.fakes.engines import FakeVerifierEngine
from tests.fakes.servers import eventually, serving
from tests.rpc.conftest import Events
from verifier_service.server import VerifierServer

METHOD = "/easyspec.v1.VerifierService/Verify"
INFO_METHOD = "/easyspec.v1.VerifierService/GetVerifierInfo"


def opening(request_id: str = "", token_id: int = 5) -> verifier_pb2.VerifyRequest:
    request = OpenVerification((token_id,), SamplingParameters(1), StopConditions(), request_id=request_id)
    return verifier_pb2.VerifyRequest(open=convert.open_verification_to_pb(request))


@pytest.fixture
async def engine() -> FakeVerifierEngine:
    return FakeVerifierEngine("base")


@pytest.fixture
async def channel(engine: FakeVerifierEngine) -> AsyncIterator[grpc.aio.Channel]:
    async with serving(VerifierServer(engine)) as address, open_channel(address) as opened:
        yield opened


async def info(channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> None:
    stub = verifier_pb2_grpc.VerifierServiceStub(channel)
    await stub.GetVerifierInfo(verifier_pb2.GetVerifierInfoRequest(), timeout=5, metadata=metadata)


async def test_the_callers_request_id_is_in_the_event(channel: grpc.aio.Channel, events: Events) -> None:
    await info(channel, *request_metadata("abc-1"))
    await eventually(lambda: bool(events()))
    [event] = events()
    assert event["event"] == "rpc_finished"
    assert (event["method"], event["code"], event["request_id"]) == (INFO_METHOD, "OK", "abc-1")
    assert event["duration_ms"] > 0


async def test_a_request_id_is_made_if_there_is_none_or_it_is_unfit(channel: grpc.aio.Channel, events: Events) -> None:
    await info(channel)
    await info(channel, ("x-request-id", ""))
    await info(channel, ("x-request-id", "x" * 1000))
    await eventually(lambda: len(events()) == 3)
    first, second, third = (event["request_id"] for event in events())
    assert len(first) == len(second) == 32
    assert first != second
    assert third == "x" * 128


async def test_an_opening_message_names_the_request_too(channel: grpc.aio.Channel, events: Events) -> None:
    call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(iter([opening("from-message")]), timeout=5)
    assert [response async for response in call] == []
    await eventually(lambda: bool(events()))
    assert events()[-1]["request_id"] == "from-message"


async def test_a_bug_is_logged_with_its_traceback_and_hidden_from_the_client(
    channel: grpc.aio.Channel, engine: FakeVerifierEngine, events: Events
) -> None:
    engine.open_fault = RuntimeError("slot 17 is lost")
    call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(iter([opening("request-7")]), timeout=5)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        _ = [response async for response in call]
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert failure.value.details() == "internal error; request id request-7"
    assert "slot 17" not in str(failure.value.trailing_metadata())
    await eventually(lambda: len(events()) == 2)
    bug, finished = events()
    assert (bug["level"], bug["request_id"], finished["code"]) == ("error", "request-7", "INTERNAL")
    assert "RuntimeError: slot 17 is lost" in bug["exception"]
    assert "Traceback" in bug["exception"]


async def test_events_name_the_refused_field_but_no_token_id(channel: grpc.aio.Channel, events: Events) -> None:
    tree = types_pb2.TokenTree(token_ids=[987_654], parent_rows=[0])
    requests = [opening(), verifier_pb2.VerifyRequest(tree=verifier_pb2.VerifyTree(base_length=1, tree=tree))]
    call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(iter(requests), timeout=5)
    with pytest.raises(grpc.aio.AioRpcError, match="987654"):
        _ = [response async for response in call]
    await eventually(lambda: bool(events()))
    [event] = events()
    assert (event["code"], event["reason"]) == ("INVALID_ARGUMENT", "INVALID_TREE")
    assert event["field"] == "tree.token_ids[0]"
    assert "987654" not in str(event)


async def test_bytes_that_do_not_parse_are_the_callers_fault(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        _ = [response async for response in channel.stream_stream(METHOD)(iter([b"\xff\xff\xff"]), timeout=5)]
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await channel.unary_unary(INFO_METHOD)(b"\xff\xff\xff", timeout=5)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_rpcs_side_by_side_keep_their_own_request_ids(channel: grpc.aio.Channel, events: Events) -> None:
    ids = [f"request-{number}" for number in range(20)]
    await asyncio.gather(*(info(channel, *request_metadata(request_id)) for request_id in ids))
    await eventually(lambda: len(events()) == 20)
    assert sorted(event["request_id"] for event in events()) == sorted(ids)


async def test_a_stream_cancelled_while_it_writes_has_freed_everything_when_it_ends() -> None:
    freed: list[str] = []

    async def behavior(request: object, context: object) -> AsyncIterator[bytes]:
        try:
            yield b"more than the client reads"
        finally:
            freed.append("session")

    class Context:
        def invocation_metadata(self) -> tuple[()]:
            return ()

        def peer(self) -> str:
            return "ipv4:127.0.0.1:1234"

        async def write(self, response: bytes) -> None:
            raise asyncio.CancelledError

    class Details:
        method = METHOD
        invocation_metadata = ()

    async def continuation(details: object) -> grpc.RpcMethodHandler:
        return grpc.unary_stream_rpc_method_handler(behavior)

    boundary = RpcBoundary("loading", lambda _: None, RoleMetrics("verifier"))
    boundary.admit()
    handler = await boundary.intercept_service(continuation, Details())
    with pytest.raises(asyncio.CancelledError):
        await handler.unary_stream(b"", Context())
    assert freed == ["session"]
    assert await boundary.wait_idle(0)


async def test_a_cancelled_rpc_has_its_event(
    channel: grpc.aio.Channel, engine: FakeVerifierEngine, events: Events
) -> None:
    # While it is busy, that is: between messages a client that goes away looks like one that has finished.
    engine.open_gate.clear()
    call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(iter([opening()]), timeout=5)
    await eventually(lambda: "open" in engine.events)
    call.cancel()
    await eventually(lambda: bool(events()))
    assert events()[-1]["code"] == "CANCELLED"
