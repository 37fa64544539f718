from __future__ import annotations

import asyncio

import pytest

from easyspec.rpc import health
from easyspec.rpc.lifecycle import RpcServer
from tests.fakes.engines import FakeVerifierEngine
from verifier_service.server import VerifierServer


async def test_exit_code_follows_health(capsys: pytest.CaptureFixture[str]) -> None:
    server = RpcServer(VerifierServer(FakeVerifierEngine("base")), "127.0.0.1:0")
    address = f"127.0.0.1:{await server.listen()}"
    assert await asyncio.to_thread(health.main, [address]) == 1
    await server.start()
    assert await asyncio.to_thread(health.main, [address]) == 0
    assert await asyncio.to_thread(health.main, [address, VerifierServer.service_name]) == 0
    assert await asyncio.to_thread(health.main, [address, "no.such.Service"]) == 1
    await server.drain(grace_s=0)
    assert await asyncio.to_thread(health.main, [address]) == 1
    assert capsys.readouterr().out.split() == ["NOT_SERVING", "SERVING", "SERVING", "NOT_FOUND", "UNAVAILABLE"]


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert health.main([]) == 1
    assert "usage" in capsys.readouterr().err
