"""The same tokens, whatever the drafter does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from easyspec.errors import CapacityError, InvalidRequestError
from easyspec.speculation.token_tree import TokenTree
from tests.fakes.services import FakePair
from tests.gateway.gateway_client import (
    Client,
    ServerInfo,
    eventually,
    expected,
    gateway,
    request_of,
    tokens,
)


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
    assert any(chunk.timings.num_draft_tokens for chunk in chunks[-60:])
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
