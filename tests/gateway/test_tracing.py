"""Traces over real sockets: client -> gateway -> drafter and verifier -> collector."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx
import pytest

from drafter_service.server import DrafterServer
from easyspec.errors import CapacityError, ConfigurationError
from easyspec.rpc.channels import open_channel, request_metadata
from easyspec.settings import load_settings
from easyspec.telemetry.tracing import open_tracing
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.otlp_collector import CollectedSpan, Collector, collecting
from tests.fakes.services import TOY_TEXT, FakeDrafterEngine, FakeVerifierEngine, ToyLanguage, running
from verifier_service.server import VerifierServer

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
REQUEST = generation_pb2.GenerateRequest(text="secretprompt", stop=types_pb2.StopConditions(max_tokens=30))


@dataclass(frozen=True)
class Stack:
    gateway: GatewayServer
    verifier: FakeVerifierEngine
    stub: generation_pb2_grpc.GenerationServiceAsyncStub

    async def generate(self, *metadata: tuple[str, str]) -> list[generation_pb2.GenerateResponse]:
        call = self.stub.Generate(REQUEST, timeout=20, metadata=(*request_metadata("r-1"), *metadata))
        return [chunk async for chunk in call]


@asynccontextmanager
async def stack(collector: Collector, language: ToyLanguage, folder: Path) -> AsyncIterator[Stack]:
    """All three roles, each with a tracing of its own; what they traced is at the collector once they have stopped."""
    verifier, drafter = FakeVerifierEngine(language), FakeDrafterEngine(language)
    traced = {role: open_tracing(role, collector.endpoint) for role in ("verifier", "drafter")}
    async with AsyncExitStack() as exits:
        verifier_service = await exits.enter_async_context(
            running(VerifierServer(verifier, tracing=traced["verifier"]))
        )
        drafter_service = await exits.enter_async_context(running(DrafterServer(drafter, tracing=traced["drafter"])))
        gateway = GatewayServer(
            GatewaySettings(
                address="127.0.0.1:0",
                http_address="127.0.0.1:0",
                tokenizer=folder,
                verifier_address=verifier_service.address,
                drafter_address=drafter_service.address,
                otlp_endpoint=collector.endpoint,
            )
        )
        service = await exits.enter_async_context(running(gateway))
        channel = await exits.enter_async_context(open_channel(service.address))
        yield Stack(gateway, verifier, generation_pb2_grpc.GenerationServiceStub(channel))


@pytest.fixture
def language(tokenizer: Tokenizer) -> ToyLanguage:
    return ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)


def check_children(collector: Collector, request: CollectedSpan) -> None:
    for service, method in (("easyspec-verifier", "Verify"), ("easyspec-drafter", "Speculate")):
        [child] = [span for span in collector.of(service) if span.trace_id == request.trace_id]
        assert child.name.endswith(f"/{method}")
        assert child.parent_id == request.span_id
        assert child.attributes["easyspec.request_id"] == request.attributes["easyspec.request_id"]


async def test_a_request_is_one_trace_through_three_roles_with_its_rounds(
    language: ToyLanguage, tokenizer_folder: Path
) -> None:
    async with collecting() as collector:
        async with stack(collector, language, tokenizer_folder) as services:
            chunks = await services.generate(("traceparent", TRACEPARENT))
        [request] = collector.of("easyspec-gateway")
        assert (request.trace_id, request.parent_id) == (TRACE_ID, PARENT_ID)
        check_children(collector, request)
        rounds = [attributes for name, attributes in request.events if name == "round"]
        assert len(rounds) == len(chunks)
        assert sum(each["num_output_tokens"] for each in rounds) == 30
        assert sum(each["num_accepted"] for each in rounds) == chunks[-1].completion.speculation.num_accepted_tokens
        assert all(each["verify_ms"] > 0 for each in rounds)
        assert request.attributes["easyspec.finish_reason"] == "length"
        for word in (b"secretprompt", b"quick", b"brown"):
            assert word not in collector.raw


async def test_requests_without_a_trace_begin_their_own_and_errors_show(
    language: ToyLanguage, tokenizer_folder: Path
) -> None:
    async with collecting() as collector:
        async with stack(collector, language, tokenizer_folder) as services:
            await asyncio.gather(services.generate(), services.generate(("traceparent", "nonsense")))
            services.verifier.error = CapacityError("secret reason")
            with pytest.raises(grpc.aio.AioRpcError):
                await services.generate()
        requests = collector.of("easyspec-gateway")
        assert len({request.trace_id for request in requests}) == 3
        assert not any(request.parent_id for request in requests)
        for request in requests:
            check_children(collector, request)
        [failed] = [request for request in requests if request.is_error]
        assert failed.attributes["easyspec.finish_reason"] == "error"
        assert b"secret reason" not in collector.raw
        # Probes between services, every few seconds, are not traced.
        assert not [span for span in collector.spans if "Info" in span.name]


async def test_rest_clients_have_their_traces_too(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with collecting() as collector:
        async with stack(collector, language, tokenizer_folder) as services:
            url = f"http://127.0.0.1:{services.gateway.http_port}/v1/completions"
            body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 5}
            async with httpx.AsyncClient(trust_env=False) as http:
                response = await http.post(url, json=body, headers={"traceparent": TRACEPARENT})
            assert response.status_code == 200
        requests = collector.of("easyspec-gateway")
        assert len(requests) == 2  # one a prompt, each with two choices
        assert {(request.trace_id, request.parent_id) for request in requests} == {(TRACE_ID, PARENT_ID)}
        parents = sorted(span.parent_id for span in collector.of("easyspec-verifier"))
        assert parents == sorted(2 * [request.span_id for request in requests])


async def test_a_collector_that_is_not_there_holds_nothing_up(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with asyncio.timeout(20):
        async with stack(Collector("http://127.0.0.1:1"), language, tokenizer_folder) as services:
            assert len(await services.generate()) > 0


def test_nothing_of_it_is_loaded_unless_it_is_asked_for() -> None:
    # The web framework looks for the API package by itself; what costs is the SDK and the exporter.
    program = (
        "import sys, gateway.service.server, verifier_service.server\n"
        "assert not {'opentelemetry.sdk', 'opentelemetry.exporter'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_missing_extra_and_a_bad_endpoint_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ftp://x:1", "127.0.0.1:4317", "http://127.0.0.1", "http://collector:4317"):
        with pytest.raises(ConfigurationError, match="otlp_endpoint"):
            load_settings(GatewaySettings, ["--tokenizer", "t", "--otlp-endpoint", name])
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigurationError, match=r"easyspec\[tracing\]"):
        open_tracing("gateway", "http://127.0.0.1:4317")
    assert open_tracing("gateway", None) is None
