"""Channels: large messages, replicas' health, servers that come back."""

from __future__ import annotations

import grpc
import pytest

from easyspec.rpc import convert
from easyspec.rpc.channels import open_channel
from easyspec.rpc.lifecycle import RpcServer
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.v1 import verifier_pb2, verifier_pb2_grpc
from tests.fakes.engines import FakeVerifierEngine
from tests.fakes.servers import serving
from verifier_service.server import VerifierServer

INFO = verifier_pb2.GetVerifierInfoRequest()


async def test_messages_beyond_grpcs_default_limit_pass() -> None:
    engine = FakeVerifierEngine("base", max_model_len=10_000_000)
    prompt = (99,) * 5_000_000
    request = OpenVerification(prompt, SamplingParameters(1), StopConditions())
    message = verifier_pb2.VerifyRequest(open=convert.open_verification_to_pb(request))
    assert message.ByteSize() > 4 * 1024 * 1024
    async with serving(VerifierServer(engine)) as address, open_channel(address) as channel:
        call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(iter([message]), timeout=10)
        assert [response async for response in call] == []
    assert "open" in engine.events


async def test_a_replica_that_is_not_serving_takes_no_rpcs() -> None:
    server = RpcServer(VerifierServer(FakeVerifierEngine("base")), "127.0.0.1:0")
    port = await server.listen()
    async with open_channel(f"127.0.0.1:{port}", health_service=VerifierServer.service_name) as channel:
        stub = verifier_pb2_grpc.VerifierServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.GetVerifierInfo(INFO, timeout=5)
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "loading" not in str(failure.value.details())  # it never reached the server
        await server.start()
        info = await stub.GetVerifierInfo(INFO, timeout=5, wait_for_ready=True)
        assert info.model.name == "base"
        await server.drain(grace_s=5)


async def test_a_server_that_comes_back_is_found_again() -> None:
    first = RpcServer(VerifierServer(FakeVerifierEngine("first")), "127.0.0.1:0")
    address = f"127.0.0.1:{await first.listen()}"
    await first.start()
    async with open_channel(address) as channel:
        stub = verifier_pb2_grpc.VerifierServiceStub(channel)
        assert (await stub.GetVerifierInfo(INFO, timeout=5)).model.name == "first"
        await first.drain(grace_s=0)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.GetVerifierInfo(INFO, timeout=5)
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        second = RpcServer(VerifierServer(FakeVerifierEngine("second")), address)
        await second.listen()
        await second.start()
        assert (await stub.GetVerifierInfo(INFO, timeout=5, wait_for_ready=True)).model.name == "second"
        await second.drain(grace_s=0)
