"""From the open port to the last RPC: a real server around a fake engine, and once around a real process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from easyspec.errors import ConfigurationError, EngineLostError, UnavailableError
from easyspec.rpc import convert
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.rpc.lifecycle import RpcServer, serve
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE
from easyspec.v1 import verifier_pb2, verifier_pb2_grpc
from tests.fakes.engines import FakeVerifierEngine
from tests.fakes.servers import eventually, serving
from tests.rpc.conftest import Events
from verifier_service.config import VerifierSettings
from verifier_service.server import VerifierServer

SERVICE = "easyspec.v1.VerifierService"
Status = health_pb2.HealthCheckResponse.ServingStatus
OPEN = verifier_pb2.VerifyRequest(
    open=convert.open_verification_to_pb(OpenVerification((5, 6, 7), SamplingParameters(1), StopConditions()))
)
TREE = verifier_pb2.VerifyRequest(tree=convert.verify_tree_to_pb(3, EMPTY_TREE))


async def health(channel: grpc.aio.Channel, service: str = SERVICE) -> str:
    request = health_pb2.HealthCheckRequest(service=service)
    response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    return Status.Name(response.status)


async def info(channel: grpc.aio.Channel) -> verifier_pb2.GetVerifierInfoResponse:
    stub = verifier_pb2_grpc.VerifierServiceStub(channel)
    return await stub.GetVerifierInfo(verifier_pb2.GetVerifierInfoRequest(), timeout=5)


async def test_health_follows_the_life_of_the_server() -> None:
    engine = FakeVerifierEngine("base")
    engine.start_gate.clear()
    server = RpcServer(VerifierServer(engine), "127.0.0.1:0")
    async with open_channel(f"127.0.0.1:{await server.listen()}") as channel:
        starting = asyncio.create_task(server.start())
        await eventually(lambda: "start" in engine.events)
        assert [await health(channel), await health(channel, "")] == ["NOT_SERVING", "NOT_SERVING"]
        with pytest.raises(grpc.aio.AioRpcError, match="loading") as refused:
            await info(channel)
        assert isinstance(error_from_rpc(refused.value), UnavailableError)

        engine.start_gate.set()
        await starting
        assert [await health(channel), await health(channel, "")] == ["SERVING", "SERVING"]
        assert (await info(channel)).model.name == "base"

        engine.step_gate.clear()
        call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(iter([OPEN, TREE]), timeout=5)
        await eventually(lambda: "step" in engine.events)
        draining = asyncio.create_task(server.drain(grace_s=5))
        await asyncio.sleep(0)
        assert [await health(channel), await health(channel, "")] == ["NOT_SERVING", "NOT_SERVING"]
        with pytest.raises(grpc.aio.AioRpcError, match="draining") as refused:
            await info(channel)
        assert isinstance(error_from_rpc(refused.value), UnavailableError)

        engine.step_gate.set()
        assert len([response async for response in call]) == 1
        assert await call.code() is grpc.StatusCode.OK
        await draining
    assert engine.events == ["start", "open", "step", "close", "stop"]


async def test_draining_cancels_what_outlives_the_grace() -> None:
    engine = FakeVerifierEngine("base")
    engine.step_gate.clear()
    server = RpcServer(VerifierServer(engine), "127.0.0.1:0")
    async with open_channel(f"127.0.0.1:{await server.listen()}") as channel:
        await server.start()
        call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(iter([OPEN, TREE]), timeout=5)
        await eventually(lambda: "step" in engine.events)
        await server.drain(grace_s=0.1)
        assert engine.events[-2:] == ["close", "stop"]
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            _ = [response async for response in call]
        assert isinstance(error_from_rpc(failure.value), UnavailableError)


async def test_a_health_watcher_does_not_hold_up_draining() -> None:
    server = RpcServer(VerifierServer(FakeVerifierEngine("base")), "127.0.0.1:0")
    async with open_channel(f"127.0.0.1:{await server.listen()}") as channel:
        await server.start()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=30)
        assert (await watch.read()).status == Status.Value("SERVING")
        started = time.monotonic()
        await server.drain(grace_s=20)
        assert time.monotonic() - started < 2
        assert (await watch.read()).status == Status.Value("NOT_SERVING")


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and SETTINGS, all default
PING = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + b"whatever"
PING_TYPE, GO_AWAY_TYPE, ACK = 6, 7, 1


async def until_ping_answered(reader: asyncio.StreamReader) -> None:
    kind, flags = None, 0
    while (kind, flags) != (PING_TYPE, ACK):
        header = await asyncio.wait_for(reader.readexactly(9), 10)
        await reader.readexactly(int.from_bytes(header[:3], "big"))
        kind, flags = header[3], header[4]
        assert kind != GO_AWAY_TYPE


async def test_pings_in_a_pause_end_no_connection() -> None:
    async with serving(VerifierServer(FakeVerifierEngine("base"))) as address:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(PREFACE)
        for _ in range(10):
            writer.write(PING)
            await until_ping_answered(reader)
        writer.close()


async def test_reflection_lists_the_services() -> None:
    async with serving(VerifierServer(FakeVerifierEngine("base"))) as address, open_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        [response] = [r async for r in stub.ServerReflectionInfo(iter([request]), timeout=5)]
        names = {service.name for service in response.list_services_response.service}
        assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_a_port_in_use_is_a_configuration_error_with_the_address() -> None:
    async with serving(VerifierServer(FakeVerifierEngine("base"))) as address:
        second = FakeVerifierEngine("base")
        with pytest.raises(ConfigurationError, match=f"address is '{address}'.*in use"):
            await RpcServer(VerifierServer(second), address).listen()
        assert second.events == []


async def test_serve_tells_its_port_and_stops_when_asked(events: Events) -> None:
    engine, stopping = FakeVerifierEngine("base"), asyncio.Event()
    settings = VerifierSettings(model="unused", address="127.0.0.1:0")
    task = asyncio.create_task(serve(VerifierServer(engine), settings, stopping))
    await eventually(lambda: any(event["event"] == "serving" for event in events()))
    [serving_event] = [event for event in events() if event["event"] == "serving"]
    assert serving_event["role"] == "tested"
    async with open_channel(f"127.0.0.1:{serving_event['port']}") as channel:
        assert await health(channel) == "SERVING"
    stopping.set()
    await task
    assert engine.events == ["start", "stop"]


async def test_serve_can_be_stopped_while_loading() -> None:
    engine, stopping = FakeVerifierEngine("base"), asyncio.Event()
    engine.start_gate.clear()
    settings = VerifierSettings(model="unused", address="127.0.0.1:0")
    task = asyncio.create_task(serve(VerifierServer(engine), settings, stopping))
    await eventually(lambda: engine.events == ["start"])
    stopping.set()
    await asyncio.wait_for(task, 2)
    assert engine.events == ["start", "stop"]


@pytest.mark.parametrize("is_draining", [False, True])
async def test_a_lost_engine_waits_for_nobody(is_draining: bool, events: Events) -> None:
    """Also after SIGTERM, which torchrun sends the moment that another rank is gone: sessions that are open cannot end
    in an orderly way any more."""
    engine, stopping = FakeVerifierEngine("base"), asyncio.Event()
    engine.step_gate.clear()
    settings = VerifierSettings(model="unused", address="127.0.0.1:0", drain_grace_s=600)
    task = asyncio.create_task(serve(VerifierServer(engine), settings, stopping))
    await eventually(lambda: any(event["event"] == "serving" for event in events()))
    port = next(event["port"] for event in events() if event["event"] == "serving")
    async with open_channel(f"127.0.0.1:{port}") as channel:
        call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(iter([OPEN, TREE]), timeout=60)
        await eventually(lambda: "step" in engine.events)
        if is_draining:
            stopping.set()
            await eventually(lambda: any(event["event"] == "draining" for event in events()))
        assert not task.done()
        engine.lost.set()
        with pytest.raises(EngineLostError):
            await asyncio.wait_for(task, 10)
        assert engine.events[-2:] == ["close", "stop"]
        assert await call.code() is not grpc.StatusCode.OK


async def test_serve_ends_with_what_start_raises() -> None:
    engine = FakeVerifierEngine("base")
    engine.start_fault = ConfigurationError("model is '/nowhere': no such folder")
    settings = VerifierSettings(model="/nowhere", address="127.0.0.1:0")
    with pytest.raises(ConfigurationError, match="no such folder"):
        await serve(VerifierServer(engine), settings, asyncio.Event())
    assert engine.events == ["start", "stop"]


PROCESS = """
import sys
from easyspec.errors import ConfigurationError
from easyspec.rpc.lifecycle import run_role
from tests.fakes.engines import FakeVerifierEngine
from verifier_service.config import VerifierSettings
from verifier_service.server import VerifierServer

def build(settings):
    engine = FakeVerifierEngine(settings.served_model_name)
    if settings.model == "/nowhere":
        engine.start_fault = ConfigurationError("model is '/nowhere': no such folder")
    return VerifierServer(engine)

sys.exit(run_role("verifier", VerifierSettings, build))
"""


async def process(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PROCESS,
        *arguments,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": "."},
    )


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
async def test_a_process_drains_on_a_signal_and_exits_0(signal_number: signal.Signals) -> None:
    running = await process("--model", "models/base", "--address", "127.0.0.1:0")
    assert running.stderr is not None
    names: list[str] = []
    while "serving" not in names:
        event = json.loads(await running.stderr.readline())
        names.append(event["event"])
    async with open_channel(f"127.0.0.1:{event['port']}") as channel:
        assert (await info(channel)).model.name == "base"
    running.send_signal(signal_number)
    rest = [json.loads(line) for line in (await running.stderr.read()).splitlines()]
    assert await running.wait() == 0
    names += [event["event"] for event in rest]
    assert names == ["listening", "serving", "draining", "stopped"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere", "--address", "127.0.0.1:0"], b"verifier: model is '/nowhere': no such folder\n"),
        (
            ["--model", "x", "--address", "192.0.2.1:1", "--allow-plaintext", "true"],
            b"verifier: address is '192.0.2.1:1': cannot listen there: ",
        ),
    ],
)
async def test_a_configuration_error_is_one_line_and_exit_2(arguments: list[str], message: bytes) -> None:
    failed = await process(*arguments)
    _, stderr = await failed.communicate()
    assert failed.returncode == 2
    plain = [line for line in stderr.splitlines(keepends=True) if not line.startswith(b"{")]  # events are JSON
    assert len(plain) == 1
    assert plain[0].startswith(message)
