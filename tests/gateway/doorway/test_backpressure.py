"""Slow readers, readers that stop, and floods, over real gRPC with the fakes behind the gateway."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from easyspec.errors import CapacityError, DeadlineError
from easyspec.rpc.errors import error_from_rpc
from easyspec.rpc.lifecycle import RpcServer
from easyspec.v1 import generation_pb2, generation_pb2_grpc
from gateway.doorway.backpressure import ended_when_unread
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.services import TOY_TEXT, FakePair, ToyLanguage, running_pair

MAX_MODEL_LEN = 200_000


@pytest.fixture
async def pair(tokenizer: Tokenizer) -> AsyncIterator[FakePair]:
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    async with running_pair(replace(language, max_model_len=MAX_MODEL_LEN)) as pair:
        yield pair


@asynccontextmanager
async def gateway(pair: FakePair, folder: Path, **fields: Any) -> AsyncIterator[str]:
    defaults = {"address": "127.0.0.1:0", "verifier_address": pair.verifier_service.address}
    settings = GatewaySettings(tokenizer=folder, **(defaults | fields))
    server = RpcServer(GatewayServer(settings), settings.address)
    port = await server.listen()
    try:
        await server.start()
        yield f"127.0.0.1:{port}"
    finally:
        await server.drain(0.0)


def request(max_tokens: int) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest(text="def f(n):")
    request.stop.max_tokens = max_tokens
    request.sampling.temperature = 0.0
    return request


# gRPC clients take some 4 MB before they stop a sender, which is 40 000 rounds: these take 64 KiB.
_SMALL_WINDOW = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096))


@asynccontextmanager
async def stub_of(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address, options=_SMALL_WINDOW) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


async def until_it_stands_still(pair: FakePair) -> int:
    """Verdicts given when there are no more."""
    while True:
        before = len(pair.verifier.trees)
        await asyncio.sleep(0.3)
        if len(pair.verifier.trees) == before > 1:
            return before


async def test_a_reader_that_stops_fills_a_bounded_buffer_and_is_ended_in_time(
    pair: FakePair, tokenizer_folder: Path
) -> None:
    async with (
        gateway(pair, tokenizer_folder, stalled_client_timeout_s=2.0) as address,
        stub_of(address) as stub,
        stub_of(address) as other,
    ):
        chunks = aiter(stub.Generate(request(MAX_MODEL_LEN), timeout=30))
        await anext(chunks)
        num_rounds = await until_it_stands_still(pair)
        assert num_rounds < 10_000
        assert len(pair.verifier.sessions) == 1
        # Meanwhile others are served as ever.
        assert [chunk async for chunk in other.Generate(request(20), timeout=20)][-1].HasField("completion")
        deadline_s = time.monotonic() + 6.0
        while pair.verifier.sessions:
            assert time.monotonic() < deadline_s, "the session of a stalled client was not freed"
            await asyncio.sleep(0.02)
        # When it reads again it gets what was sent, then the reason.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in chunks:
                pass
        assert isinstance(error_from_rpc(caught.value), DeadlineError)
        assert "nothing was read for 2 s" in str(caught.value.details())


async def test_a_slow_reader_gets_everything(pair: FakePair, tokenizer_folder: Path) -> None:
    async with gateway(pair, tokenizer_folder, stalled_client_timeout_s=2.0) as address, stub_of(address) as stub:
        call = stub.Generate(request(3000), timeout=60)
        num_tokens = 0
        async for chunk in call:
            num_tokens += len(chunk.token_ids)
            if num_tokens % 500 == 0:
                await asyncio.sleep(0.3)
        assert num_tokens == 3000


async def answer(stub: Any) -> str:
    try:
        chunks = [chunk async for chunk in stub.Generate(request(20), timeout=60)]
    except grpc.aio.AioRpcError as error:
        refusal = error_from_rpc(error)
        assert isinstance(refusal, CapacityError)
        assert refusal.retry_after_s > 0
        return "refused"
    return "complete" if sum(len(chunk.token_ids) for chunk in chunks) == 20 else "cut"


async def test_a_flood_from_one_host_does_not_starve_another(pair: FakePair, tokenizer_folder: Path) -> None:
    pair.verifier.delay_s = 0.005
    settings = {"max_concurrent_requests": 2, "max_waiting_requests": 20, "allow_plaintext": True}
    async with gateway(pair, tokenizer_folder, address="[::]:0", admission_timeout_s=30.0, **settings) as address:
        port = address.rpartition(":")[2]
        async with stub_of(f"127.0.0.1:{port}") as flooding, stub_of(f"[::1]:{port}") as other:
            flood = [asyncio.create_task(answer(flooding)) for _ in range(60)]
            done_first: list[int] = []
            await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)  # the queue is full by now
            for _ in range(3):
                assert await answer(other) == "complete"
                done_first.append(sum(task.done() and task.result() == "complete" for task in flood))
            ends = await asyncio.gather(*flood)
    # Each waited for a turn or two, not for the twenty that came before it. The sooner some of the flood are served,
    # the more of its last find room.
    assert done_first[-1] <= 14
    assert 20 <= ends.count("complete") < 40
    assert ends.count("refused") == 60 - ends.count("complete")


class Source:
    """An async generator whose closing can be seen."""

    def __init__(self) -> None:
        self.num_made = 0
        self.is_closed = False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            while True:
                self.num_made += 1
                yield self.num_made
        finally:
            await asyncio.sleep(0)  # closing takes a moment, as freeing a session does
            self.is_closed = True


async def test_nothing_is_made_before_what_came_before_was_taken() -> None:
    source = Source()
    items = ended_when_unread(source.items(), 10.0)
    assert [await anext(items) for _ in range(3)] == [1, 2, 3]
    await asyncio.sleep(0.01)
    assert source.num_made == 3
    await items.aclose()
    assert source.is_closed


async def test_an_untaken_item_closes_the_source_while_the_consumer_is_still_away() -> None:
    source = Source()
    items = ended_when_unread(source.items(), 0.02)
    await anext(items)
    async with asyncio.timeout(5.0):
        while not source.is_closed:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    with pytest.raises(DeadlineError):
        await anext(items)


async def test_a_consumer_that_comes_back_as_the_time_is_up_sees_one_of_both_and_no_mess() -> None:
    for _ in range(20):
        source = Source()
        items = ended_when_unread(source.items(), 0.001)
        await anext(items)
        time.sleep(0.002)  # the timer is due, and has not run  # noqa: ASYNC251
        try:
            assert await anext(items) == 2
        except DeadlineError:
            assert source.is_closed
        await items.aclose()
        assert source.is_closed
