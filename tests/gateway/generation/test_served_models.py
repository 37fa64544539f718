"""Several base models behind one drafter: each request goes to its model, and no model takes another down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from drafter_service.server import DrafterServer
from easyspec.errors import ConfigurationError, UnknownModelError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.rpc.health import check
from easyspec.settings import load_settings
from easyspec.v1 import generation_pb2, generation_pb2_grpc
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from tests.fakes.captured_logs import captured_logs
from tests.fakes.servers import eventually
from tests.fakes.services import FakeDrafterEngine, FakeVerifierEngine, RunningService, ToyLanguage, running
from verifier_service.server import VerifierServer

PROMPT = "def f(n):"
ServerInfo = generation_pb2.GetServerInfoResponse


@dataclass(frozen=True)
class Pool:
    """Two base models, which say different things, and one drafter that guesses the first one's."""

    large: FakeVerifierEngine
    small: FakeVerifierEngine
    drafter: FakeDrafterEngine
    large_service: RunningService
    small_service: RunningService
    drafter_service: RunningService

    def settings(self, folder: Path, **fields: Any) -> GatewaySettings:
        defaults: dict[str, Any] = {
            "address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "tokenizer": folder,
            "verifier_address": self.large_service.address,
            "drafter_address": self.drafter_service.address,
            "further_models": {"small": {"verifier_address": self.small_service.address}},
            "draft_deadline_ms": 2000,
            "retry_first_ms": 10,
            "retry_max_ms": 50,
            "probe_interval_s": 0.05,
            "verifier_open_timeout_s": 0.2,
        }
        return GatewaySettings(**(defaults | fields))


@pytest.fixture
async def pool(language: ToyLanguage) -> AsyncIterator[Pool]:
    backwards = replace(language, token_ids=language.token_ids[::-1], model_fingerprint="5a11", max_model_len=1024)
    large, small, drafter = FakeVerifierEngine(language), FakeVerifierEngine(backwards), FakeDrafterEngine(language)
    async with (
        running(VerifierServer(large)) as large_service,
        running(VerifierServer(small)) as small_service,
        running(DrafterServer(drafter)) as drafter_service,
    ):
        yield Pool(large, small, drafter, large_service, small_service, drafter_service)


@dataclass(frozen=True)
class Served:
    """A gateway over the pool, and clients of both of its doors."""

    pool: Pool
    gateway: GatewayServer
    stub: Any
    http: httpx.AsyncClient
    address: str

    async def text(self, model: str, **fields: Any) -> str:
        response = await self.http.post("/v1/completions", json=body(model, **fields))
        assert response.status_code == 200, response.text
        reply = response.json()
        assert reply["model"] == (model or "toy-base")
        return str(reply["choices"][0]["text"])

    async def info(self) -> ServerInfo:
        return await self.stub.GetServerInfo(generation_pb2.GetServerInfoRequest())

    async def until_grpc_health_is(self, name: str, status: str) -> None:
        async with asyncio.timeout(5):
            while await asyncio.to_thread(check, self.address, service=name) != status:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def health(self) -> dict[str, Any]:
        return dict((await self.http.get("/health")).json())


def body(model: str, **fields: Any) -> dict[str, Any]:
    named = {"model": model} if model else {}
    return named | {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "speculation": {"mode": "on"}} | fields


@asynccontextmanager
async def serving(pool: Pool, settings: GatewaySettings) -> AsyncIterator[Served]:
    async with AsyncExitStack() as stack:
        gateway = GatewayServer(settings)
        service = await stack.enter_async_context(running(gateway))
        channel = await stack.enter_async_context(open_channel(service.address))
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        base_url = f"http://127.0.0.1:{gateway.http_port}"
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=base_url, trust_env=False))
        yield Served(pool, gateway, stub, http, service.address)


@pytest.fixture
async def served(pool: Pool, tokenizer_folder: Path) -> AsyncIterator[Served]:
    async with serving(pool, pool.settings(tokenizer_folder)) as served:
        yield served


async def test_a_request_goes_to_the_model_that_it_names(served: Served) -> None:
    texts = await asyncio.gather(*(served.text(model) for model in ("toy-base", "small", "") for _ in range(3)))
    large, small, unnamed = set(texts[:3]), set(texts[3:6]), set(texts[6:])
    assert len(large) == len(small) == 1
    assert large != small
    assert unnamed == large
    assert (served.pool.large.num_opened, served.pool.small.num_opened) == (6, 3)
    # One drafter served all of them, and was told which model it guesses for.
    assert served.pool.drafter.num_opened == 9


async def test_the_drafter_is_told_for_which_base_it_guesses(served: Served) -> None:
    told: list[str] = []
    open_session = served.pool.drafter.open

    async def listen(request: Any) -> int:
        told.append(request.base_fingerprint)
        return await open_session(request)

    served.pool.drafter.open = listen  # type: ignore[method-assign]
    await served.text("small")
    await served.text("toy-base")
    assert told == ["5a11", "70f"]


async def test_grpc_routes_and_lists_as_rest_does(served: Served) -> None:
    def request(model: str) -> generation_pb2.GenerateRequest:
        wanted = generation_pb2.GenerateRequest(model=model, text=PROMPT)
        wanted.sampling.temperature = 0
        wanted.stop.max_tokens = 40
        return wanted

    for model in ("small", "toy-base"):
        said = "".join([chunk.text async for chunk in served.stub.Generate(request(model))])
        assert said == await served.text(model)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [chunk async for chunk in served.stub.Generate(request("medium"))]
    error = error_from_rpc(caught.value)
    assert isinstance(error, UnknownModelError)
    for name in ("medium", "toy-base", "small"):
        assert name in str(error)
    listed = await served.stub.ListModels(generation_pb2.ListModelsRequest())
    assert [(model.name, model.max_model_len) for model in listed.models] == [("toy-base", 2048), ("small", 1024)]
    info = await served.info()
    assert [model.name for model in info.served_models] == ["toy-base", "small"]
    assert {model.base_model.fingerprint for model in info.served_models} == {"70f", "5a11"}
    assert [model.draft_model.name for model in info.served_models] == ["toy-draft"] * 2


async def test_rest_lists_all_and_refuses_others(served: Served) -> None:
    cards = (await served.http.get("/v1/models")).json()["data"]
    assert [(card["id"], card["max_model_len"]) for card in cards] == [("toy-base", 2048), ("small", 1024)]
    assert (await served.http.get("/v1/models/small")).json() == cards[1]
    for path, content in (
        ("/v1/completions", body("medium")),
        ("/v1/chat/completions", {"model": "medium", "messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"model": "medium", "prompt": "hi"}),
    ):
        response = await served.http.post(path, json=content)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert response.json()["error"]["param"] == "model"
    reply = await served.http.post("/tokenize", json={"model": "small", "prompt": "hi"})
    assert reply.json()["max_model_len"] == 1024


async def test_one_model_s_verifier_may_be_lost_and_come_back(served: Served) -> None:
    small = await served.text("small")
    assert (await served.health())["status"] == "ok"
    await served.pool.small_service.kill()
    generator = served.gateway.models.of("small")
    await eventually(lambda: not generator.verifier_peer.is_ready, within_s=5)
    assert await served.text("toy-base")
    lost = await served.http.post("/v1/completions", json=body("small"))
    assert lost.status_code == 503
    health = await served.health()
    assert health["status"] == "degraded"
    assert health["models"] == {
        "toy-base": {"verifier": "ready", "drafter": "ready"},
        "small": {"verifier": "unreachable", "drafter": "ready"},
    }
    assert (await served.http.get("/health/toy-base")).status_code == 200
    assert (await served.http.get("/health/small")).status_code == 503
    assert (await served.http.get("/health/medium")).status_code == 404
    states = {model.name: model.verifier_state for model in (await served.info()).served_models}
    assert states == {"toy-base": ServerInfo.PEER_STATE_READY, "small": ServerInfo.PEER_STATE_UNREACHABLE}
    await served.until_grpc_health_is("small", "NOT_SERVING")
    await served.until_grpc_health_is("toy-base", "SERVING")
    await served.until_grpc_health_is("", "SERVING")
    await served.pool.small_service.start()
    await eventually(lambda: generator.verifier_peer.is_ready, within_s=5)
    assert await served.text("small") == small
    await served.until_grpc_health_is("small", "SERVING")


async def test_requests_of_a_lost_model_keep_no_places_of_another(pool: Pool, tokenizer_folder: Path) -> None:
    settings = pool.settings(tokenizer_folder, max_concurrent_requests=1, max_waiting_requests=0)
    async with serving(pool, settings) as served:
        pool.small.delay_s = 60.0
        hanging = asyncio.create_task(served.text("small"))
        await eventually(lambda: served.gateway.models.of("small").num_running == 1, within_s=5)
        assert await served.text("toy-base")
        assert (await served.info()).num_running_requests == 1
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)


async def test_each_model_learns_what_speculation_brings_by_itself(served: Served) -> None:
    await served.text("toy-base", max_tokens=200)
    large, small = (served.gateway.models.of(name).speculation for name in ("toy-base", "small"))
    assert large.state().acceptance_by_level
    assert not small.state().acceptance_by_level


async def test_metrics_are_told_by_model(served: Served) -> None:
    await served.text("small")
    await served.text("toy-base")
    samples = {
        (sample.name, sample.labels.get("model_name")): sample.value
        for family in text_string_to_metric_families(served.gateway.metrics.render().decode())
        for sample in family.samples
    }
    for name in ("toy-base", "small"):
        assert samples[("vllm:generation_tokens_total", name)] == 40
        assert samples[("vllm:num_requests_running", name)] == 0
        assert samples[("easyspec_model_ready", name)] == 1


async def test_a_model_may_come_later_than_the_gateway(pool: Pool, tokenizer_folder: Path) -> None:
    await pool.large_service.kill()
    async with serving(pool, pool.settings(tokenizer_folder)) as served:
        assert await served.text("small")
        # The name of the first one is not known yet: it may be this.
        for model in ("toy-base", ""):
            assert (await served.http.post("/v1/completions", json=body(model))).status_code == 503
        assert [card["id"] for card in (await served.http.get("/v1/models")).json()["data"]] == ["small"]
        await pool.large_service.start()
        await eventually(lambda: served.gateway.models.first.name == "toy-base", within_s=5)
        assert await served.text("toy-base")


async def test_a_further_model_may_have_no_drafter(pool: Pool, tokenizer_folder: Path) -> None:
    further = {"small": {"verifier_address": pool.small_service.address, "drafter_address": "off"}}
    async with serving(pool, pool.settings(tokenizer_folder, further_models=further)) as served:
        assert await served.text("small")
        assert pool.drafter.num_opened == 0
        assert (await served.health())["models"]["small"]["drafter"] == "none"


@pytest.mark.parametrize("role", ["verifier", "drafter"])
async def test_another_vocabulary_is_refused_by_its_first_differing_entries(
    pool: Pool, tokenizer_folder: Path, role: str
) -> None:
    ours = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    theirs = {token_id: token for token, token_id in ours.items()}
    theirs[9], theirs[11] = "nine", "eleven"
    engine = pool.small if role == "verifier" else pool.drafter
    engine.language = replace(engine.language, fingerprint="f" * 64, vocabulary=theirs)
    gateway = GatewayServer(pool.settings(tokenizer_folder, http_address="off"))
    with pytest.raises(ConfigurationError) as caught:
        await gateway.start()
    await gateway.stop()
    for part in (role, "9 is", "'nine'", "11 is", "'eleven'", "f" * 64):
        assert part in str(caught.value)


async def test_padding_is_said_once_and_goes_on(pool: Pool, tokenizer_folder: Path) -> None:
    pool.drafter.language = replace(pool.drafter.language, vocab_size=512)
    with captured_logs() as logs:
        async with serving(pool, pool.settings(tokenizer_folder)) as served:
            assert await served.text("small")
            assert await served.text("toy-base")
    events = [json.loads(line) for line in logs.getvalue().splitlines()]
    [note] = [event["note"] for event in events if event["event"] == "vocabularies_padded"]
    assert "352 rows" in note
    assert "512" in note


def test_further_models_are_read_from_flags_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--tokenizer", "x", "--drafter-address", "127.0.0.1:7"]
    wanted = '{"small": {"verifier_address": "127.0.0.1:8,127.0.0.1:9"}, "mute": {"verifier_address": "127.0.0.1:6", '
    wanted += '"tokenizer": "y", "drafter_address": "off"}}'
    by_flag = load_settings(GatewaySettings, [*flags, "--further-models", wanted])
    monkeypatch.setenv("EASYSPEC_GATEWAY_FURTHER_MODELS", wanted)
    for settings in (by_flag, load_settings(GatewaySettings, flags)):
        first, small, mute = settings.routes
        assert (first.name, first.verifier_addresses) == ("", ("127.0.0.1:50053",))
        assert (small.name, small.verifier_addresses) == ("small", ("127.0.0.1:8", "127.0.0.1:9"))
        assert (small.tokenizer, small.drafter_addresses) == (Path("x"), ("127.0.0.1:7",))
        assert (mute.tokenizer, mute.drafter_addresses) == (Path("y"), ())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('{"small": {}}', ["further_models", "required"]),
        ('{"small": {"verifier_address": "a:1", "typo": 1}}', ["further_models"]),
        ('{"small": {"verifier_address": "a:1,,b:2"}}', ["further_models", "empty"]),
        ('{"small": {"verifier_address": "far.example:1"}}', ["further_models['small'].verifier_address", "peer_tls"]),
        ('{"": {"verifier_address": "127.0.0.1:1"}}', ["further_models"]),
    ],
)
def test_a_bad_further_model_is_named(value: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(GatewaySettings, ["--tokenizer", "x", "--further-models", value])
    for word in words:
        assert word in str(caught.value)


async def test_two_models_of_one_name_are_refused(pool: Pool, tokenizer_folder: Path) -> None:
    further = {"toy-base": {"verifier_address": pool.small_service.address}}
    gateway = GatewayServer(pool.settings(tokenizer_folder, http_address="off", further_models=further))
    with pytest.raises(ConfigurationError, match="toy-base"):
        await gateway.start()
    await gateway.stop()
