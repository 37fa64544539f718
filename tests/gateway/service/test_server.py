"""Completions as a client of the gateway sees them, who goes away, and start-up."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from easyspec.errors import ConfigurationError, UnavailableError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.lifecycle import RpcServer
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.services import FakePair, ToyLanguage, running_pair
from tests.gateway.gateway_client import (
    PROMPT,
    Client,
    Mode,
    ServerInfo,
    eventually,
    expected,
    gateway,
    request_of,
    settings_for,
    text,
    tokens,
)


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
    chunks = await client.generate(mode=Mode.MODE_ON)
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


async def test_eight_streams_at_once(client: Client) -> None:
    client.pair.verifier.delay_s = 0.002
    prompts = ["a" * (i + 1) for i in range(8)]
    ids = ({"ids": [5] * (i + 1)} for i in range(len(prompts)))
    results = await asyncio.gather(*(client.generate(token_ids=one, mode=Mode.MODE_ON) for one in ids))
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


async def test_a_chat_ends_with_its_turn(
    pair: FakePair, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the model calls its end: here it names none."""
    folder = tmp_path / "turns"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    stops: list[frozenset[int]] = []
    opened = pair.verifier._open
    monkeypatch.setattr(pair.verifier, "_open", lambda o: (stops.append(o.stop.stop_token_ids), opened(o))[1])
    chat = generation_pb2.ChatPrompt(messages=[generation_pb2.ChatMessage(role="user", content="hello")])
    async with gateway(pair, folder) as client:
        await client.generate(chat=chat, max_tokens=2)
        await client.generate(max_tokens=2)
    assert stops == [frozenset({0}), frozenset()]
