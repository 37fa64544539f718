"""Requests that are refused, and services that refuse them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from easyspec.errors import CapacityError, InvalidRequestError, UnavailableError
from easyspec.v1 import generation_pb2
from gateway.text.tokenizer import Tokenizer
from tests.fakes.services import FakePair
from tests.gateway.gateway_client import (
    Client,
    eventually,
    expected,
    gateway,
    request_of,
    tokens,
)


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


async def test_a_prompt_that_waits_for_a_place_is_not_tokenized(
    pair: FakePair, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizing costs seconds and memory: a request has to be let in first."""
    num_tokenized = 0
    encode = Tokenizer.encode

    def counted(self: Tokenizer, text: str, max_tokens: int | None = None) -> tuple[int, ...]:
        nonlocal num_tokenized
        num_tokenized += 1
        return encode(self, text, max_tokens)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    async with gateway(pair, tokenizer_folder, max_concurrent_requests=1, admission_timeout_s=0.2) as client:
        pair.verifier.delay_s = 0.05
        running = asyncio.create_task(client.generate(prompt="a", max_tokens=40))
        await eventually(lambda: bool(pair.verifier.sessions))
        refused = await asyncio.gather(*(client.generate(prompt="b") for _ in range(4)), return_exceptions=True)
        assert all(isinstance(each, grpc.aio.AioRpcError) for each in refused)
        assert num_tokenized == 1
        running.cancel()
