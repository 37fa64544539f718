"""Several verifiers behind a gateway, over real gRPC: lost, drained, full, wrong; the tokens stay the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from drafter_service.server import DrafterServer
from easyspec.errors import CapacityError, EasyspecError, InvalidRequestError, UnavailableError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.v1 import generation_pb2, generation_pb2_grpc
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.servers import eventually
from tests.fakes.services import (
    TOY_TEXT,
    FakeDrafterEngine,
    FakeVerifierEngine,
    RunningService,
    ToyLanguage,
    running,
)
from tests.gateway.gateway_client import tokens
from verifier_service.server import VerifierServer

PROMPT_LENGTH = 6
READY = generation_pb2.GetServerInfoResponse.PEER_STATE_READY


@dataclass(frozen=True)
class Cluster:
    """A gateway, its verifiers and drafters."""

    stub: Any
    language: ToyLanguage
    verifiers: list[FakeVerifierEngine]
    services: list[RunningService]
    drafters: list[FakeDrafterEngine]
    drafter_services: list[RunningService]

    def request(self, num_tokens: int = 60, seed: int | None = None) -> generation_pb2.GenerateRequest:
        request = generation_pb2.GenerateRequest(token_ids={"ids": [5] * PROMPT_LENGTH})
        request.sampling.temperature = 0.0 if seed is None else 1.0
        request.sampling.seed = seed or 0
        request.stop.max_tokens = num_tokens
        request.speculation.mode = generation_pb2.SpeculationParameters.MODE_ON
        return request

    def expected(self, num_tokens: int = 60, seed: int | None = None) -> list[int]:
        cycle = self.language.token_ids
        return [cycle[(PROMPT_LENGTH + (seed or 0) + i) % len(cycle)] for i in range(num_tokens)]

    async def generate(self, num_tokens: int = 60, timeout_s: float = 20.0) -> list[generation_pb2.GenerateResponse]:
        return [chunk async for chunk in self.stub.Generate(self.request(num_tokens), timeout=timeout_s)]

    async def refusal(self, timeout_s: float = 20.0) -> EasyspecError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(timeout_s=timeout_s)
        return error_from_rpc(caught.value)

    def busy(self) -> int:
        """Which verifier has the one session that there is."""
        (index,) = (index for index, verifier in enumerate(self.verifiers) if verifier.sessions)
        return index

    def is_empty(self) -> bool:
        return not any(engine.sessions for engine in (*self.verifiers, *self.drafters))

    async def info(self) -> generation_pb2.GetServerInfoResponse:
        return await self.stub.GetServerInfo(generation_pb2.GetServerInfoRequest())


def num_failures(chunks: list[generation_pb2.GenerateResponse]) -> int:
    return chunks[-1].completion.speculation.num_verifier_failures


@pytest.fixture
def language(tokenizer: Tokenizer) -> ToyLanguage:
    return ToyLanguage(tokenizer.encode(TOY_TEXT), vocab_size=352, fingerprint=tokenizer.fingerprint)


@asynccontextmanager
async def cluster(
    folder: Path,
    *languages: ToyLanguage,
    num_drafters: int = 1,
    idle_timeout_s: float = 60.0,
    is_one_name: bool = False,
    **settings: Any,
) -> AsyncIterator[Cluster]:
    """One verifier for each language, listed one by one or as what gRPC takes for one name of many."""
    verifiers = [FakeVerifierEngine(language) for language in languages]
    drafters = [FakeDrafterEngine(languages[0]) for _ in range(num_drafters)]
    async with AsyncExitStack() as stack:
        services = [
            await stack.enter_async_context(running(VerifierServer(verifier, idle_timeout_s))) for verifier in verifiers
        ]
        drafter_services = [await stack.enter_async_context(running(DrafterServer(drafter))) for drafter in drafters]
        addresses = ",".join(service.address for service in services)
        defaults: dict[str, Any] = {
            "tokenizer": folder,
            "verifier_address": f"ipv4:{addresses}" if is_one_name else addresses,
            "drafter_address": ",".join(service.address for service in drafter_services) or None,
            "retry_first_ms": 10,
            "retry_max_ms": 50,
            "probe_interval_s": 0.1,
        }
        gateway = await stack.enter_async_context(running(GatewayServer(GatewaySettings(**defaults | settings))))
        channel = await stack.enter_async_context(open_channel(gateway.address))
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        yield Cluster(stub, languages[0], verifiers, services, drafters, drafter_services)


# --- lost in mid-stream -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_one_name", [False, True], ids=["list", "name"])
@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("seed", [None, 3], ids=["greedy", "sampled"])
async def test_another_replica_goes_on_with_the_same_tokens(
    language: ToyLanguage, tokenizer_folder: Path, num_chunks: int, seed: int | None, is_one_name: bool
) -> None:
    async with cluster(tokenizer_folder, language, language, is_one_name=is_one_name) as it:
        for verifier in it.verifiers:
            verifier.delay_s = 0.01
        rounds = aiter(it.stub.Generate(it.request(120, seed), timeout=20))
        chunks = [await anext(rounds) for _ in range(num_chunks)]
        lost = it.busy()
        await it.services[lost].kill()
        chunks += [chunk async for chunk in rounds]
        assert tokens(chunks) == it.expected(120, seed)
        assert num_failures(chunks) == 1
        assert chunks[-1].completion.speculation.num_accepted_tokens > 60
        assert it.verifiers[1 - lost].num_opened == 1
        await eventually(it.is_empty, 5)
        # One lost replica is not a lost verifier, and new requests are not sent to it.
        assert (await it.info()).verifier_state == READY
        again = await it.generate()
        assert (tokens(again), num_failures(again)) == (it.expected(), 0)


async def test_a_single_verifier_that_comes_back_is_waited_for(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with cluster(tokenizer_folder, language) as it:
        it.verifiers[0].delay_s = 0.01
        rounds = aiter(it.stub.Generate(it.request(120), timeout=20))
        chunks = [await anext(rounds) for _ in range(3)]
        await it.services[0].kill()
        going_on = asyncio.create_task(anext(rounds))
        await asyncio.sleep(0.3)
        await it.services[0].start()
        chunks += [await going_on, *[chunk async for chunk in rounds]]
        assert tokens(chunks) == it.expected(120)
        assert num_failures(chunks) == 1


async def test_streams_of_a_draining_replica_end_there_or_go_elsewhere_and_new_ones_begin_elsewhere(
    language: ToyLanguage, tokenizer_folder: Path
) -> None:
    async with cluster(tokenizer_folder, language, language) as it:
        for verifier in it.verifiers:
            verifier.delay_s = 0.01
        rounds = aiter(it.stub.Generate(it.request(400), timeout=20))
        chunks = [await anext(rounds)]
        draining = it.busy()
        drain = asyncio.create_task(it.services[draining].kill(grace_s=0.3))
        await asyncio.sleep(0.05)
        opened = it.verifiers[draining].num_opened
        short = await asyncio.gather(*(it.generate(20) for _ in range(4)))
        assert all(tokens(one) == it.expected(20) for one in short)
        assert it.verifiers[draining].num_opened == opened
        chunks += [chunk async for chunk in rounds]
        assert tokens(chunks) == it.expected(400)
        assert num_failures(chunks) == 1
        await drain


async def test_every_stream_of_a_lost_replica_moves(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with cluster(tokenizer_folder, language, language) as it:
        for verifier in it.verifiers:
            verifier.delay_s = 0.01
        streams = [asyncio.create_task(it.generate(200)) for _ in range(8)]

        def have_all_begun() -> bool:
            sessions = [session for verifier in it.verifiers for session in verifier.sessions.values()]
            return len(sessions) == 8 and all(len(session.committed) > PROMPT_LENGTH + 1 for session in sessions)

        await eventually(have_all_begun, 5)
        await it.services[0].kill()
        results = await asyncio.gather(*streams)
        assert all(tokens(chunks) == it.expected(200) for chunks in results)
        assert sorted(map(num_failures, results)) == [0] * 4 + [1] * 4
        await eventually(it.is_empty, 5)


async def test_a_stream_waits_no_longer_than_the_setting(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with cluster(tokenizer_folder, language, verifier_reopen_timeout_s=0.4, verifier_open_timeout_s=0.1) as it:
        it.verifiers[0].delay_s = 0.01
        rounds = aiter(it.stub.Generate(it.request(120), timeout=20))
        await anext(rounds)
        started_s = time.monotonic()
        await it.services[0].kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in rounds:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert 0.3 < time.monotonic() - started_s < 5
        assert isinstance(await it.refusal(), UnavailableError)


async def test_a_clients_deadline_ends_the_wait(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with cluster(tokenizer_folder, language) as it:
        it.verifiers[0].delay_s = 0.01
        rounds = aiter(it.stub.Generate(it.request(500), timeout=0.6))
        await anext(rounds)
        await it.services[0].kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in rounds:
                pass
        assert caught.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        await eventually(it.is_empty, 5)


# --- who must not be mixed in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_one_name", [False, True], ids=["list", "name"])
async def test_a_replica_with_another_model_is_never_mixed_in(
    language: ToyLanguage, tokenizer_folder: Path, is_one_name: bool
) -> None:
    other = replace(language, model_fingerprint="07h", token_ids=tuple(reversed(language.token_ids)))
    async with cluster(tokenizer_folder, language, other, is_one_name=is_one_name) as it:
        says = {tuple(it.expected()), tuple(replace(it, language=other).expected())}
        results = await asyncio.gather(*(it.generate() for _ in range(8)))
        # Which of the two is in force is chance behind one name; that each request is one model's is not.
        assert {tuple(tokens(chunks)) for chunks in results} <= says
        if not is_one_name:
            assert sum(verifier.num_opened > 0 for verifier in it.verifiers) == 1


@pytest.mark.parametrize("is_one_name", [False, True], ids=["list", "name"])
async def test_a_stream_does_not_go_on_with_another_model(
    language: ToyLanguage, tokenizer_folder: Path, is_one_name: bool
) -> None:
    other = replace(language, model_fingerprint="07h")
    async with cluster(tokenizer_folder, language, other, verifier_reopen_timeout_s=0.5, is_one_name=is_one_name) as it:
        for verifier in it.verifiers:
            verifier.delay_s = 0.01
        rounds = aiter(it.stub.Generate(it.request(200), timeout=20))
        await anext(rounds)
        lost = it.busy()
        await it.services[lost].kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in rounds:
                pass
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert it.verifiers[1 - lost].num_opened == 0
        # A new request may: now this model is in force.
        assert tokens(await it.generate()) == it.expected()
        assert it.verifiers[1 - lost].num_opened == 1


async def test_a_replica_with_another_tokenizer_is_refused_and_the_others_serve(
    language: ToyLanguage, tokenizer_folder: Path
) -> None:
    other = replace(language, fingerprint="f" * 64)
    async with cluster(tokenizer_folder, language, language, language, verifier_open_timeout_s=0) as it:
        await it.services[1].kill()
        it.verifiers[1].language = other
        opened = it.verifiers[1].num_opened
        await it.services[1].start()
        await asyncio.sleep(0.3)  # probed by now
        results = [await it.generate() for _ in range(4)]
        assert all(tokens(chunks) == it.expected() for chunks in results)
        assert it.verifiers[1].num_opened == opened
        assert (await it.info()).verifier_state == READY


# --- errors -----------------------------------------------------------------------------------------------------


async def test_what_would_be_refused_again_is_refused_at_once(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with cluster(tokenizer_folder, language, language) as it:
        for verifier in it.verifiers:
            verifier.error = InvalidRequestError("sampling.top_k", 0, "at least 1")
        error = await it.refusal()
        assert isinstance(error, InvalidRequestError)
        assert error.field == "sampling.top_k"
        assert sum(verifier.num_opened for verifier in it.verifiers) == 1


async def test_a_full_replica_sends_a_new_request_to_another(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with cluster(tokenizer_folder, language, language) as it:
        it.verifiers[0].open_error = CapacityError("no KV memory", 3.0)
        for _ in range(3):
            assert tokens(await it.generate()) == it.expected()
        it.verifiers[1].open_error = CapacityError("no KV memory", 3.0)
        started_s = time.monotonic()
        error = await it.refusal()
        assert isinstance(error, CapacityError)
        assert error.retry_after_s == 3.0
        assert time.monotonic() - started_s < 2


async def test_a_stream_waits_for_room(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with cluster(tokenizer_folder, language, language) as it:
        for verifier in it.verifiers:
            verifier.delay_s = 0.01
        rounds = aiter(it.stub.Generate(it.request(120), timeout=20))
        chunks = [await anext(rounds)]
        lost = it.busy()
        it.verifiers[1 - lost].open_error = CapacityError("no KV memory", 0.1)
        await it.services[lost].kill()
        going_on = asyncio.create_task(anext(rounds))
        await asyncio.sleep(0.3)
        it.verifiers[1 - lost].open_error = None
        chunks += [await going_on, *[chunk async for chunk in rounds]]
        assert tokens(chunks) == it.expected(120)


async def test_a_fault_of_one_step_costs_a_pause_and_a_lasting_one_the_request(
    language: ToyLanguage, tokenizer_folder: Path
) -> None:
    async with cluster(tokenizer_folder, language) as it:
        verifier = it.verifiers[0]
        verifier.delay_s = 0.01
        rounds = aiter(it.stub.Generate(it.request(120), timeout=20))
        chunks = [await anext(rounds)]
        verifier.error = RuntimeError("a fault that another session caused")
        await eventually(lambda: not verifier.sessions, 5)
        verifier.error = None
        chunks += [chunk async for chunk in rounds]
        assert tokens(chunks) == it.expected(120)
        verifier.error, opened = RuntimeError("a bug"), verifier.num_opened
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.generate()
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert verifier.num_opened - opened == 2


async def test_a_session_ended_for_silence_is_opened_again(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with cluster(tokenizer_folder, language, idle_timeout_s=0.15) as it:
        it.drafters[0].delay_s = 0.3  # longer than the verifier waits for the next tree
        chunks = await it.generate(20)
        assert tokens(chunks) == it.expected(20)
        assert num_failures(chunks) >= 2
        assert it.verifiers[0].num_opened == 1 + num_failures(chunks)


# --- drafters ---------------------------------------------------------------------------------------------------


async def test_drafting_goes_on_with_another_drafter(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with cluster(tokenizer_folder, language, num_drafters=2) as it:
        it.verifiers[0].delay_s = 0.01
        rounds = aiter(it.stub.Generate(it.request(300), timeout=20))
        chunks = [await anext(rounds) for _ in range(3)]
        (lost,) = (index for index, drafter in enumerate(it.drafters) if drafter.sessions)
        await it.drafter_services[lost].kill()
        chunks += [chunk async for chunk in rounds]
        assert tokens(chunks) == it.expected(300)
        assert chunks[-1].completion.speculation.num_drafter_failures == 1
        assert it.drafters[1 - lost].num_drafts > 5
        assert (await it.info()).drafter_state == READY
