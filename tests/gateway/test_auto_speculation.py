"""What the process's choice does to a running request: sessions at the drafter come and go, the tokens stay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from easyspec.rpc.channels import open_channel
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.speculation.arms import OFF
from gateway.speculation.controller import SpeculationController
from gateway.text.tokenizer import Tokenizer
from tests.fakes.servers import eventually
from tests.fakes.services import TOY_TEXT, FakePair, ToyLanguage, running, running_pair

Mode = generation_pb2.SpeculationParameters


@dataclass(frozen=True)
class Served:
    """A gateway whose controller only changes its mind when the test says so."""

    stub: Any
    pair: FakePair
    controller: SpeculationController
    prompt_length: int

    def request(self, max_tokens: int, mode: int = Mode.MODE_AUTO, **budget: int) -> generation_pb2.GenerateRequest:
        request = generation_pb2.GenerateRequest(text="def f(n):")
        request.stop.max_tokens = max_tokens
        request.sampling.temperature = 0.0
        request.speculation.mode = mode  # type: ignore[assignment]
        if budget:
            request.speculation.budget.CopyFrom(types_pb2.TreeBudget(**budget))
        return request

    def expected(self, num_tokens: int) -> list[int]:
        token_ids = self.pair.language.token_ids
        return [token_ids[(self.prompt_length + i) % len(token_ids)] for i in range(num_tokens)]


@asynccontextmanager
async def served(tokenizer: Tokenizer, folder: Path) -> AsyncIterator[Served]:
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    async with running_pair(replace(language, max_model_len=20_000)) as pair:
        settings = GatewaySettings(
            address="127.0.0.1:0",
            tokenizer=folder,
            verifier_address=pair.verifier_service.address,
            drafter_address=pair.drafter_service.address,
        )
        server = GatewayServer(settings)
        async with running(server) as service, open_channel(service.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            yield Served(stub, pair, server.generator.speculation, len(tokenizer.encode("def f(n):")))


@pytest.fixture
async def frozen(
    tokenizer: Tokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    async with served(tokenizer, tokenizer_folder) as here:
        monkeypatch.setattr(here.controller, "observe", lambda *_: None)
        here.pair.verifier.delay_s = 0.002
        yield here


async def taken(chunks: Any, until: Callable[[generation_pb2.GenerateResponse], bool]) -> list[int]:
    """Tokens up to and including the first chunk that is as wanted."""
    token_ids: list[int] = []
    async with asyncio.timeout(20):
        async for chunk in chunks:
            token_ids += chunk.token_ids
            if until(chunk):
                break
    return token_ids


def is_drafted(chunk: generation_pb2.GenerateResponse) -> bool:
    return chunk.timings.num_draft_tokens > 0


async def test_off_holds_nothing_at_the_drafter_and_on_comes_back_in_the_background(frozen: Served) -> None:
    controller, drafter = frozen.controller, frozen.pair.drafter
    full = controller.arm
    controller.arm = OFF
    chunks = aiter(frozen.stub.Generate(frozen.request(3000), timeout=60))
    token_ids = [*(await anext(chunks)).token_ids, *(await anext(chunks)).token_ids]
    assert drafter.num_opened == 0
    drafter.delay_s = 0.4  # catching up takes its time: plain rounds go on meanwhile
    controller.arm = full
    num_before = len(token_ids)
    token_ids += await taken(chunks, is_drafted)
    assert len(token_ids) - num_before > 5
    drafter.delay_s = 0.0
    token_ids += await taken(chunks, is_drafted)
    assert len(drafter.sessions) == 1
    controller.arm = OFF
    left = 0

    def is_freed(_: generation_pb2.GenerateResponse) -> bool:
        nonlocal left
        left += 1
        return left > 60

    token_ids += await taken(chunks, is_freed)
    await eventually(lambda: not drafter.sessions)
    controller.arm = full
    token_ids += await taken(chunks, lambda chunk: chunk.HasField("completion"))
    assert token_ids == frozen.expected(3000)
    assert drafter.num_opened == 2


async def test_a_short_pause_keeps_the_session_which_catches_up_with_its_next_draft(frozen: Served) -> None:
    controller, drafter = frozen.controller, frozen.pair.drafter
    full = controller.arm
    chunks = aiter(frozen.stub.Generate(frozen.request(1000), timeout=60))
    token_ids = await taken(chunks, is_drafted)
    for _ in range(5):
        controller.arm = OFF
        token_ids += await taken(chunks, lambda chunk: not is_drafted(chunk))
        token_ids += await taken(chunks, lambda chunk: not is_drafted(chunk))
        controller.arm = full
        token_ids += await taken(chunks, is_drafted)
    token_ids += await taken(chunks, lambda chunk: chunk.HasField("completion"))
    assert token_ids == frozen.expected(1000)
    assert drafter.num_opened == 1


async def test_modes_and_caps(frozen: Served) -> None:
    async def trees(request: generation_pb2.GenerateRequest) -> set[int]:
        chunks = [chunk async for chunk in frozen.stub.Generate(request, timeout=20)]
        assert [token_id for chunk in chunks for token_id in chunk.token_ids] == frozen.expected(100)
        assert chunks[-1].completion.speculation.num_drafter_failures == 0
        return {chunk.timings.num_draft_tokens for chunk in chunks[1:]}

    full = frozen.controller.arm = frozen.controller.arms[-1]
    budget = {"num_levels": 2, "width": 1, "num_nodes": 3}
    assert max(await trees(frozen.request(100))) == 10  # the fake's chain of 5 levels, each with a sibling
    assert max(await trees(frozen.request(100, **budget))) == 3
    assert max(await trees(frozen.request(100, Mode.MODE_ON, **budget))) == 3
    frozen.controller.arm = OFF
    assert await trees(frozen.request(100)) == {0}
    assert max(await trees(frozen.request(100, Mode.MODE_ON))) == 10
    frozen.controller.arm = full
    assert await trees(frozen.request(100, Mode.MODE_OFF)) == {0}


async def test_a_controller_that_changes_its_mind_all_the_time_changes_no_token(
    tokenizer: Tokenizer, tokenizer_folder: Path
) -> None:
    async with served(tokenizer, tokenizer_folder) as here:
        here.pair.verifier.delay_s = 0.001

        async def stir() -> None:
            while True:
                for arm in here.controller.arms:
                    here.controller.arm = arm
                    await asyncio.sleep(0.013)

        stirring = asyncio.create_task(stir())
        try:

            async def tokens(mode: int) -> list[int]:
                chunks = [chunk async for chunk in here.stub.Generate(here.request(400, mode), timeout=60)]
                return [token_id for chunk in chunks for token_id in chunk.token_ids]

            modes = [Mode.MODE_AUTO] * 6 + [Mode.MODE_ON, Mode.MODE_OFF]
            assert all(
                token_ids == here.expected(400) for token_ids in await asyncio.gather(*(tokens(mode) for mode in modes))
            )
        finally:
            stirring.cancel()
        await eventually(lambda: not here.pair.drafter.sessions and not here.pair.verifier.sessions)
        assert here.controller.state().num_running == 0
