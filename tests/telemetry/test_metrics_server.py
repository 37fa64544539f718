"""The small HTTP port, spoken to over sockets."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from easyspec.errors import ConfigurationError
from easyspec.rpc.lifecycle import RpcServer, serve
from easyspec.rpc.tls import ServerCertificates
from easyspec.telemetry.metrics import EngineMetrics, StepReport
from easyspec.telemetry.metrics_server import MetricsServer
from easyspec.tls import ServerTls
from tests.fakes.captured_logs import captured_logs
from tests.fakes.certificates import Authority
from tests.fakes.engines import FakeVerifierEngine
from verifier_service.config import VerifierSettings
from verifier_service.server import VerifierServer


async def ask(port: int, request: bytes, tls: ssl.SSLContext | None = None) -> tuple[str, bytes]:
    """Status line and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
    writer.write(request)
    async with asyncio.timeout(10):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return head.partition(b"\r\n")[0].decode(), body


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.fixture
def metrics() -> EngineMetrics:
    return EngineMetrics("verifier")


@pytest.fixture
async def port(metrics: EngineMetrics) -> AsyncIterator[int]:
    server = MetricsServer(metrics, lambda: True)
    yield await server.listen("127.0.0.1:0")
    await server.close()


async def test_metrics_are_prometheus_text(port: int, metrics: EngineMetrics) -> None:
    metrics.step(StepReport("verify", 3_000_000, 40, 2))
    metrics.refused("CAPACITY")
    status, body = await ask(port, get("/metrics"))
    assert status == "HTTP/1.1 200 OK"
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }
    assert samples[("easyspec_engine_step_rows_sum", "verify")] == 40
    assert samples[("easyspec_engine_step_seconds_sum", "verify")] == pytest.approx(0.003)
    assert samples[("easyspec_refusals_total", "CAPACITY")] == 1
    assert [key for key in samples if key[0] == "easyspec_build_info"]
    assert samples[("process_resident_memory_bytes",)] > 0


async def test_what_is_not_understood_gets_an_answer_or_none(port: int) -> None:
    assert (await ask(port, get("/")))[0].startswith("HTTP/1.1 404")
    assert (await ask(port, get("/metrics", "POST")))[0].startswith("HTTP/1.1 405")
    status, body = await ask(port, get("/health?x=1", "HEAD"))
    assert (status, body) == ("HTTP/1.1 200 OK", b"")
    for garbage in (b"\x16\x03\x01\x00garbage\r\n\r\n", b"\r\n\r\n", b"GET\r\n\r\n"):
        assert (await ask(port, garbage))[0].startswith("HTTP/1.1 404")
    assert await ask(port, b"x" * 100_000) == ("", b"")
    assert (await ask(port, get("/health")))[0] == "HTTP/1.1 200 OK"


async def test_a_port_that_is_taken_is_named(port: int, metrics: EngineMetrics) -> None:
    with pytest.raises(ConfigurationError, match=f"metrics_address.*{port}"):
        await MetricsServer(metrics, lambda: True).listen(f"127.0.0.1:{port}")


async def test_it_speaks_tls(metrics: EngineMetrics, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.issue("server")
    certificates = ServerCertificates(ServerTls(files.certificate, files.key))
    server = MetricsServer(metrics, lambda: True, certificates.ssl_context())
    port = await server.listen("127.0.0.1:0")
    try:
        context = ssl.create_default_context(cafile=authority.ca)
        assert (await ask(port, get("/health"), context))[0] == "HTTP/1.1 200 OK"
    finally:
        await server.close()


def test_metrics_tell_what_a_model_is_computed_with(metrics: EngineMetrics) -> None:
    info = FakeVerifierEngine("base").model_info
    metrics.serves(replace(info, executor="native-avx2", weight_format="int4"), "0 | 1-2")
    line = next(line for line in metrics.render().decode().splitlines() if line.startswith("easyspec_model_info{"))
    for label in (f'model="{info.name}"', 'executor="native-avx2"', 'weights="int4"', 'layer_groups="0 | 1-2"'):
        assert label in line


async def test_health_follows_the_life_of_the_process() -> None:
    engine = FakeVerifierEngine("base")
    engine.start_gate.clear()
    settings = VerifierSettings(model="m", address="127.0.0.1:0", metrics_address="127.0.0.1:0", drain_grace_s=0)
    stopping = asyncio.Event()
    with captured_logs() as logs:
        serving = asyncio.create_task(serve(VerifierServer(engine), settings, stopping))
        async with asyncio.timeout(5):
            while '"metrics"' not in logs.getvalue() or "start" not in engine.events:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        port = int(logs.getvalue().partition('"port": ')[2].partition(",")[0])
        status, body = await ask(port, get("/metrics"))
        assert status == "HTTP/1.1 200 OK"
        assert b"easyspec_kv_slots" not in body
        assert (await ask(port, get("/health")))[0].startswith("HTTP/1.1 503")
        engine.start_gate.set()
        async with asyncio.timeout(5):
            while '"serving"' not in logs.getvalue():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert (await ask(port, get("/health"))) == ("HTTP/1.1 200 OK", b"SERVING\n")
        assert b"easyspec_kv_slots 1024.0" in (await ask(port, get("/metrics")))[1]
        stopping.set()
        await serving
        with pytest.raises(OSError, match="Connect"):
            await ask(port, get("/health"))


async def test_health_says_so_while_draining() -> None:
    server = RpcServer(VerifierServer(FakeVerifierEngine("base")), "127.0.0.1:0")
    await server.listen()
    assert not server.is_serving
    await server.start()
    assert server.is_serving
    await server.drain(0)
    assert not server.is_serving
