from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from easyspec.errors import CapacityError, ConfigurationError, EasyspecError, InvalidRequestError, UnavailableError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.rpc.lifecycle import RpcServer
from easyspec.speculation.token_tree import TokenTree
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.config import GatewaySettings
from gateway.server import GatewayServer
from gateway.tokenizer import Tokenizer
from tests.fakes.services import FakePair, ToyLanguage, running, running_pair

PROMPT = "def f(n):"
Mode = generation_pb2.SpeculationParameters
ServerInfo = generation_pb2.GetServerInfoResponse


@dataclass(frozen=True)
class Client:
    """A client of the gateway under test, and the fakes behind it."""

    stub: Any
    pair: FakePair
    folder: Path

    async def generate(self, timeout_s: float = 20.0, **fields: Any) -> list[generation_pb2.GenerateResponse]:
        request = request_of(**fields)
        return [chunk async for chunk in self.stub.Generate(request, timeout=timeout_s)]

    async def refusal(self, **fields: Any) -> EasyspecError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(**fields)
        return error_from_rpc(caught.value)

    async def info(self) -> generation_pb2.GetServerInfoResponse:
        return await self.stub.GetServerInfo(generation_pb2.GetServerInfoRequest())

    async def until_drafter_is(self, state: int) -> None:
        async with asyncio.timeout(5):
            while (await self.info()).drafter_state != state:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def request_of(
    prompt: str = PROMPT, max_tokens: int | None = 60, temperature: float = 0.0, mode: int = 0, **fields: Any
) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest(**fields)
    if request.WhichOneof("prompt") is None:
        request.text = prompt
    if not request.sampling.HasField("temperature"):
        request.sampling.temperature = temperature
    if max_tokens is not None and not request.stop.HasField("max_tokens"):
        request.stop.max_tokens = max_tokens
    request.speculation.mode = mode  # type: ignore[assignment]
    return request


def tokens(chunks: list[generation_pb2.GenerateResponse]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def text(chunks: list[generation_pb2.GenerateResponse]) -> str:
    return "".join(chunk.text for chunk in chunks)


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Seconds until the condition held; fails the test if it never does."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "condition did not come true"
        await asyncio.sleep(0.005)
    return time.monotonic() - started


def settings_for(pair: FakePair, folder: Path, **fields: Any) -> GatewaySettings:
    defaults: dict[str, Any] = {
        "address": "127.0.0.1:0",
        "tokenizer": folder,
        "verifier_address": pair.verifier_service.address,
        "drafter_address": pair.drafter_service.address,
        "draft_deadline_ms": 300,
        "retry_first_ms": 10,
        "retry_max_ms": 50,
        "probe_interval_s": 0.1,
    }
    return GatewaySettings(**(defaults | fields))


@asynccontextmanager
async def gateway(pair: FakePair, folder: Path, **fields: Any) -> AsyncIterator[Client]:
    async with (
        running(GatewayServer(settings_for(pair, folder, **fields))) as service,
        open_channel(service.address) as channel,
    ):
        yield Client(generation_pb2_grpc.GenerationServiceStub(channel), pair, folder)


@pytest.fixture
async def client(pair: FakePair, tokenizer_folder: Path) -> AsyncIterator[Client]:
    async with gateway(pair, tokenizer_folder) as client:
        yield client


def expected(client: Client, num_tokens: int = 60, seed: int = 0, prompt_length: int | None = None) -> list[int]:
    language = client.pair.language
    start = (prompt_length or len(Tokenizer.load(client.folder).encode(PROMPT))) + seed
    return [language.token_ids[(start + i) % len(language.token_ids)] for i in range(num_tokens)]


# --- the same tokens, whatever the drafter does -----------------------------------------------------------------


async def test_a_completion_is_the_base_models_text(client: Client, tokenizer: Tokenizer) -> None:
    chunks = await client.generate()
    assert tokens(chunks) == expected(client)
    assert text(chunks) == tokenizer.decode(expected(client))
    completion = chunks[-1].completion
    assert completion.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert completion.WhichOneof("matched_stop") is None
    assert completion.usage.num_prompt_tokens == len(tokenizer.encode(PROMPT))
    assert completion.usage.num_output_tokens == 60
    assert not any(chunk.HasField("completion") for chunk in chunks[:-1])


async def test_statistics_and_timings_tell_what_happened(client: Client) -> None:
    chunks = await client.generate()
    statistics = chunks[-1].completion.speculation
    assert statistics.num_rounds == len(chunks)
    assert statistics.num_draft_rounds == len(chunks) - 1  # the first tree is empty
    assert statistics.num_draft_tokens == sum(chunk.timings.num_draft_tokens for chunk in chunks) > 0
    assert statistics.num_accepted_tokens == sum(chunk.num_accepted for chunk in chunks) > 40
    assert statistics.num_drafted_by_level[0] == len(chunks) - 1
    assert sum(statistics.num_accepted_by_level) == statistics.num_accepted_tokens
    assert list(statistics.num_accepted_by_level) == sorted(statistics.num_accepted_by_level, reverse=True)
    mean = 1 + statistics.num_accepted_tokens / statistics.num_draft_rounds
    assert statistics.mean_acceptance_length == pytest.approx(mean)
    assert statistics.num_drafter_failures == 0
    assert statistics.total_ns > 0
    assert not statistics.sources  # this drafter does not tell
    assert statistics.time_to_first_token_ns > 0
    second = chunks[1].timings
    assert (second.calibrate_ns, second.fuzzy_ns, second.compute_ns, second.num_draft_levels) == (200, 300, 2000, 5)
    assert second.num_fuzzy_steps == 4
    assert (second.num_batch_rows, second.num_batch_sessions) == (second.num_draft_tokens + 1, 1)
    assert second.round_ns >= second.draft_ns + second.verify_ns > 0
    assert chunks[0].timings.draft_ns == 0
    assert len(chunks[1].token_texts) == len(chunks[1].token_ids) > 1


async def test_the_drafter_is_told_how_long_a_session_can_get(client: Client) -> None:
    client.pair.verifier.delay_s = 0.02
    for max_tokens, total in ((60, 66), (5000, 2048)):
        stream = client.stub.Generate(request_of(max_tokens=max_tokens), timeout=20)
        await anext(aiter(stream))
        await eventually(lambda: bool(client.pair.drafter.sessions))
        (session,) = client.pair.drafter.sessions.values()
        assert session.opening.max_total_length == total
        stream.cancel()
        await eventually(lambda: not client.pair.drafter.sessions)


async def test_plain_decoding_has_the_same_tokens_and_asks_no_drafter(client: Client) -> None:
    chunks = await client.generate(mode=Mode.MODE_OFF)
    assert tokens(chunks) == expected(client)
    assert all(len(chunk.token_ids) == 1 for chunk in chunks)
    assert not any(chunk.token_texts for chunk in chunks)
    assert chunks[-1].completion.speculation.mean_acceptance_length == 0
    assert client.pair.drafter.num_opened == 0


async def test_no_drafter_configured_is_plain_decoding(pair: FakePair, tokenizer_folder: Path) -> None:
    async with gateway(pair, tokenizer_folder, drafter_address=None) as client:
        assert tokens(await client.generate()) == expected(client)
        assert (await client.info()).drafter_state == ServerInfo.PEER_STATE_UNSPECIFIED


async def test_a_drafter_that_is_always_wrong_changes_nothing(client: Client) -> None:
    client.pair.drafter.wrong_every = 1
    chunks = await client.generate()
    assert tokens(chunks) == expected(client)
    assert chunks[-1].completion.speculation.num_accepted_tokens == 0


async def test_a_late_drafter_costs_its_deadline_once_and_no_token(pair: FakePair, tokenizer_folder: Path) -> None:
    async with gateway(pair, tokenizer_folder, draft_deadline_ms=100, retry_first_ms=2000, retry_max_ms=2000) as client:
        client.pair.drafter.delay_s = 5.0
        started = time.monotonic()
        chunks = await client.generate()
        assert tokens(chunks) == expected(client)
        assert chunks[-1].completion.speculation.num_drafter_failures == 1
        # The next request knows already and does not wait at all.
        again = await client.generate()
        assert again[-1].completion.speculation.num_drafter_failures == 0
        assert time.monotonic() - started < 1.5
        await eventually(lambda: not client.pair.drafter.sessions)


async def test_a_drafter_late_once_is_taken_up_again_in_the_same_stream(client: Client) -> None:
    client.pair.verifier.delay_s = 0.01
    client.pair.drafter.delay_s = 1.0
    stream = client.stub.Generate(request_of(max_tokens=300), timeout=20)
    rounds = aiter(stream)
    chunks = [await anext(rounds) for _ in range(2)]
    client.pair.drafter.delay_s = 0.0
    chunks += [chunk async for chunk in rounds]
    assert tokens(chunks) == expected(client, 300)
    statistics = chunks[-1].completion.speculation
    assert statistics.num_drafter_failures == 1
    assert statistics.num_draft_rounds > 10
    assert chunks[-2].timings.num_draft_tokens > 0


async def test_a_drafter_that_dies_in_mid_stream_and_comes_back(client: Client) -> None:
    client.pair.verifier.delay_s = 0.01
    stream = client.stub.Generate(request_of(max_tokens=600), timeout=30)
    rounds = aiter(stream)
    chunks = [await anext(rounds) for _ in range(4)]
    assert chunks[-1].timings.num_draft_tokens > 0
    await client.pair.drafter_service.kill()
    chunks += [await anext(rounds) for _ in range(10)]
    assert chunks[-1].timings.num_draft_tokens == 0
    assert (await client.info()).drafter_state == ServerInfo.PEER_STATE_UNREACHABLE
    await client.pair.drafter_service.start()
    chunks += [chunk async for chunk in rounds]
    assert tokens(chunks) == expected(client, 600)
    assert chunks[-2].timings.num_draft_tokens > 0
    assert chunks[-1].completion.speculation.num_drafter_failures >= 1


async def test_a_drafter_that_starts_after_the_gateway_is_used(pair: FakePair, tokenizer_folder: Path) -> None:
    await pair.drafter_service.kill()
    async with gateway(pair, tokenizer_folder) as client:
        assert tokens(await client.generate()) == expected(client)
        await pair.drafter_service.start()
        await client.until_drafter_is(ServerInfo.PEER_STATE_READY)
        assert (await client.generate())[-1].completion.speculation.num_draft_rounds > 0


@pytest.mark.parametrize(
    "error", [CapacityError("no KV memory"), InvalidRequestError("layer_plan", 99, "less"), RuntimeError("bug")]
)
async def test_a_failing_drafter_costs_no_token(client: Client, error: Exception) -> None:
    client.pair.drafter.open_error = error
    chunks = await client.generate()
    assert tokens(chunks) == expected(client)
    assert chunks[-1].completion.speculation.num_drafter_failures >= 1


async def test_a_request_the_drafter_refuses_is_not_tried_again(client: Client) -> None:
    client.pair.verifier.delay_s = 0.005
    client.pair.drafter.open_error = InvalidRequestError("layer_plan.layer_parallel_size", 99, "1 to 8")
    chunks = await client.generate()
    assert chunks[-1].completion.speculation.num_drafter_failures == 1
    client.pair.drafter.open_error = None
    assert (await client.generate())[-1].completion.speculation.num_draft_rounds > 0


@pytest.mark.parametrize(
    "tree", [TokenTree((1, 2), (0, 5)), TokenTree((100_000,), (0,)), TokenTree(tuple(range(60)), (0,) * 60)]
)
async def test_a_tree_that_is_none_never_reaches_the_verifier(client: Client, tree: TokenTree) -> None:
    client.pair.drafter.tree = tree
    assert tokens(await client.generate()) == expected(client)
    assert all(len(seen) == 0 for seen in client.pair.verifier.trees)


async def test_eight_streams_at_once(client: Client) -> None:
    client.pair.verifier.delay_s = 0.002
    prompts = ["a" * (i + 1) for i in range(8)]
    results = await asyncio.gather(*(client.generate(token_ids={"ids": [5] * (i + 1)}) for i in range(len(prompts))))
    for i, chunks in enumerate(results):
        assert tokens(chunks) == expected(client, prompt_length=i + 1)
        assert chunks[-1].completion.speculation.num_accepted_tokens > 40


async def test_a_seed_is_drawn_reported_and_reproduces(client: Client) -> None:
    first = await client.generate(temperature=1.0)
    seed = first[-1].completion.seed
    again = await client.generate(sampling={"temperature": 1.0, "seed": seed}, mode=Mode.MODE_OFF)
    assert tokens(again) == tokens(first) == expected(client, seed=seed)
    assert again[-1].completion.seed == seed
    assert (await client.generate(temperature=1.0))[-1].completion.seed != seed


# --- stops and characters ---------------------------------------------------------------------------------------


async def test_no_chunk_ends_in_half_a_character(client: Client, tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("😀")) > 1
    for mode in (Mode.MODE_ON, Mode.MODE_OFF):
        chunks = await client.generate(mode=mode, max_tokens=200)
        assert text(chunks) == tokenizer.decode(expected(client, 200))
        assert not any("\ufffd" in chunk.text for chunk in chunks[:-1])


@pytest.mark.parametrize("offset", range(7))
async def test_a_stop_string_at_every_offset_of_a_block(client: Client, tokenizer: Tokenizer, offset: int) -> None:
    client.pair.drafter.wrong_every = 10_000
    # A prompt of another length moves the stop to another place in the block.
    prompt_ids = [5] * (7 + offset)
    plain = await client.generate(token_ids={"ids": prompt_ids}, stop_strings=["STOP"], mode=Mode.MODE_OFF)
    drafted = await client.generate(token_ids={"ids": prompt_ids}, stop_strings=["STOP"])
    assert tokens(drafted) == tokens(plain)
    assert text(drafted) == text(plain)
    full = tokenizer.decode(expected(client, prompt_length=len(prompt_ids)))
    assert text(plain) == full[: full.index("STOP")]
    assert "STOP" in tokenizer.decode(tokens(plain))
    assert "STOP" not in tokenizer.decode(tokens(plain)[:-1])
    completion = drafted[-1].completion
    assert completion.finish_reason == types_pb2.FINISH_REASON_STOP
    assert completion.stop_string == "STOP"
    assert completion.usage.num_output_tokens == len(tokens(plain))


async def test_a_stop_token_inside_a_block_is_the_last_token(client: Client) -> None:
    client.pair.drafter.wrong_every = 10_000
    stop = expected(client)[9]
    chunks = await client.generate(stop={"stop_token_ids": [stop]})
    cut = expected(client).index(stop) + 1
    assert tokens(chunks) == expected(client)[:cut]
    assert chunks[-1].completion.token_id == stop


async def test_a_stop_string_beats_the_length_on_the_same_token(client: Client) -> None:
    whole = await client.generate(stop_strings=["STOP"])
    cut = await client.generate(stop_strings=["STOP"], max_tokens=len(tokens(whole)))
    assert cut[-1].completion.finish_reason == types_pb2.FINISH_REASON_STOP
    shorter = await client.generate(stop_strings=["STOP"], max_tokens=len(tokens(whole)) - 1)
    assert shorter[-1].completion.finish_reason == types_pb2.FINISH_REASON_LENGTH


# --- requests that are refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"text": ""}, "prompt.text"),
        ({"token_ids": {"ids": []}}, "prompt"),
        ({"token_ids": {"ids": [1, 352]}}, "prompt.token_ids[1]"),
        ({"chat": {}}, "prompt.chat.messages"),
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"sampling": {"top_p": 0.0}}, "sampling.top_p"),
        ({"sampling": {"top_k": 0}}, "sampling.top_k"),
        ({"stop": {"max_tokens": 0}}, "stop.max_tokens"),
        ({"stop_strings": [""]}, "stop_strings[0]"),
        ({"stop_strings": ["x"] * 17}, "stop_strings"),
        ({"speculation": {"budget": {"num_levels": 5, "width": 4, "num_nodes": 65}}}, "budget.num_nodes"),
        (
            {"speculation": {"layer_plan": {"layer_parallel_size": 0}}},
            "speculation.layer_plan.layer_parallel_size",
        ),
    ],
)
async def test_bad_input_names_the_field(client: Client, fields: dict[str, Any], field: str) -> None:
    error = await client.refusal(**fields)
    assert isinstance(error, InvalidRequestError)
    assert error.field == field
    assert tokens(await client.generate()) == expected(client)


async def test_no_prompt_at_all(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="prompt is None"):
        async for _ in client.stub.Generate(generation_pb2.GenerateRequest()):
            pass


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model": "gpt-9"}, grpc.StatusCode.NOT_FOUND),
        ({"token_ids": {"ids": [5] * 2048}}, grpc.StatusCode.OUT_OF_RANGE),
    ],
)
async def test_statuses(client: Client, fields: dict[str, Any], code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.generate(**fields)
    assert caught.value.code() is code


async def test_a_lost_verifier_is_unavailable(pair: FakePair, tokenizer_folder: Path) -> None:
    async with gateway(pair, tokenizer_folder, verifier_open_timeout_s=0, verifier_reopen_timeout_s=0) as client:
        await check_a_lost_verifier_is_unavailable(client)


async def check_a_lost_verifier_is_unavailable(client: Client) -> None:
    client.pair.verifier.delay_s = 0.01
    stream = client.stub.Generate(request_of(max_tokens=1000), timeout=20)
    rounds = aiter(stream)
    await anext(rounds)
    await client.pair.verifier_service.kill()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in rounds:
            pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert isinstance(await client.refusal(), UnavailableError)
    await client.pair.verifier_service.start()
    client.pair.verifier.delay_s = 0.0
    await eventually_generates(client)


async def eventually_generates(client: Client) -> None:
    deadline = time.monotonic() + 5
    while True:
        try:
            assert tokens(await client.generate()) == expected(client)
            return
        except grpc.aio.AioRpcError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_a_verifier_error_reaches_the_client_as_it_is(client: Client) -> None:
    client.pair.verifier.error = CapacityError("no KV memory", 3.0)
    error = await client.refusal()
    assert isinstance(error, CapacityError)
    assert error.retry_after_s == 3.0


async def test_a_session_the_verifier_refuses_is_refused_in_its_words(client: Client) -> None:
    client.pair.verifier.open_error = CapacityError("no KV memory", 3.0)
    for _ in range(20):  # the refusal races with the first tree
        error = await client.refusal()
        assert isinstance(error, CapacityError)
        assert error.retry_after_s == 3.0


async def test_too_many_requests_are_refused_with_a_hint(pair: FakePair, tokenizer_folder: Path) -> None:
    pair.verifier.delay_s = 0.05
    async with gateway(
        pair, tokenizer_folder, max_concurrent_requests=1, max_waiting_requests=1, admission_timeout_s=0.2
    ) as client:
        running_one = client.stub.Generate(request_of(max_tokens=1000), timeout=20)
        await anext(aiter(running_one))
        waiting = asyncio.create_task(client.refusal())
        await asyncio.sleep(0.05)
        refused_at_once = await client.refusal()
        assert not waiting.done()
        for error in (refused_at_once, await waiting):
            assert isinstance(error, CapacityError)
            assert error.retry_after_s > 0
        running_one.cancel()
        await eventually(lambda: not pair.verifier.sessions)
        pair.verifier.delay_s = 0.0
        assert len(tokens(await client.generate())) == 60


# --- who goes away frees what it held ---------------------------------------------------------------------------


async def test_a_client_that_disconnects_frees_both_sessions(client: Client) -> None:
    client.pair.verifier.delay_s = 0.02
    stream = client.stub.Generate(request_of(max_tokens=1000), timeout=20)
    rounds = aiter(stream)
    for _ in range(3):
        await anext(rounds)
    assert len(client.pair.verifier.sessions) == len(client.pair.drafter.sessions) == 1
    stream.cancel()
    gone = await eventually(lambda: not client.pair.verifier.sessions and not client.pair.drafter.sessions)
    assert gone < 1.0
    assert (await client.info()).num_running_requests == 0


async def test_a_deadline_frees_both_sessions(client: Client) -> None:
    client.pair.verifier.delay_s = 0.02
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.generate(timeout_s=0.3, max_tokens=1000)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gone = await eventually(lambda: not client.pair.verifier.sessions and not client.pair.drafter.sessions)
    assert gone < 1.0


async def test_a_finished_request_frees_both_sessions(client: Client) -> None:
    await client.generate(stop_strings=["STOP"])
    assert await eventually(lambda: not client.pair.verifier.sessions and not client.pair.drafter.sessions) < 1.0


# --- start-up and tokenizers ------------------------------------------------------------------------------------


async def test_info_and_models(client: Client) -> None:
    info = await client.info()
    assert (info.models[0].name, info.draft_model.name) == ("toy-base", "toy-draft")
    assert (info.verifier_state, info.drafter_state) == (ServerInfo.PEER_STATE_READY, ServerInfo.PEER_STATE_READY)
    assert info.default_budget == types_pb2.TreeBudget(num_levels=5, width=4, num_nodes=15)
    models = await client.stub.ListModels(generation_pb2.ListModelsRequest())
    assert [model.name for model in models.models] == ["toy-base"]


async def test_the_gateway_waits_for_its_verifier(pair: FakePair, tokenizer_folder: Path) -> None:
    await pair.verifier_service.kill()
    server = RpcServer(GatewayServer(settings_for(pair, tokenizer_folder)), "127.0.0.1:0")
    port = await server.listen()
    starting = asyncio.create_task(server.start())
    async with open_channel(f"127.0.0.1:{port}") as channel:
        client = Client(generation_pb2_grpc.GenerationServiceStub(channel), pair, tokenizer_folder)
        assert isinstance(await client.refusal(), UnavailableError)
        assert not starting.done()
        await pair.verifier_service.start()
        await asyncio.wait_for(starting, 5)
        assert tokens(await client.generate()) == expected(client)
    await server.drain(0)


@pytest.mark.parametrize("role", ["verifier", "drafter"])
async def test_mismatched_tokenizers_fail_at_start_up(language: ToyLanguage, tokenizer_folder: Path, role: str) -> None:
    other = replace(language, fingerprint="f" * 64)
    base, draft = (other, language) if role == "verifier" else (language, other)
    async with running_pair(base, draft) as pair:
        server = GatewayServer(settings_for(pair, tokenizer_folder))
        with pytest.raises(ConfigurationError) as caught:
            await server.start()
        await server.stop()
        for part in (role, "f" * 64, language.fingerprint):
            assert part in str(caught.value)


async def test_a_drafter_replaced_by_one_with_another_tokenizer_is_refused(client: Client) -> None:
    own = client.pair.drafter.language
    await client.pair.drafter_service.kill()
    client.pair.drafter.language = replace(own, fingerprint="f" * 64)
    await client.pair.drafter_service.start()
    await client.until_drafter_is(ServerInfo.PEER_STATE_REFUSED)
    opened = client.pair.drafter.num_opened
    assert tokens(await client.generate()) == expected(client)
    assert client.pair.drafter.num_opened == opened
