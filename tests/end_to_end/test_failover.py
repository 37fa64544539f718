"""Verifiers killed with SIGKILL in mid-stream: real processes, real models, the text of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from easyspec.cli.clients import Completion, GatewayClient, GenerateFlags, SamplingFlags
from easyspec.cli.processes import ServiceProcess, ServiceStack, StackSettings
from easyspec.rpc.channels import open_channel
from easyspec.speculation.parameters import StopConditions
from easyspec.v1 import verifier_pb2, verifier_pb2_grpc

PROMPT = "def fibonacci(n):"
GREEDY = GenerateFlags(PROMPT, SamplingFlags(seed=7, temperature=0.0), StopConditions(150, ignore_eos=True))
SAMPLED = replace(GREEDY, sampling=SamplingFlags(seed=7, temperature=0.8))
ONE_THREAD = dict.fromkeys(("verifier", "drafter"), ("--num-threads", "1"))
FLAGS = ONE_THREAD | {"gateway": ("--retry-first-ms", "20", "--retry-max-ms", "100", "--draft-deadline-ms", "20000")}


@dataclass(frozen=True)
class Output:
    """What a client saw."""

    text: str
    token_ids: tuple[int, ...]
    completion: Completion

    @property
    def said(self) -> tuple[str, tuple[int, ...]]:
        return self.text, self.token_ids

    @property
    def num_failures(self) -> int:
        return self.completion.speculation.num_verifier_failures


@dataclass(frozen=True)
class Running:
    """The processes, and a client of the gateway."""

    stack: ServiceStack
    client: GatewayClient

    async def generate(self, flags: GenerateFlags, kill_after: int | None = None, restarts: bool = True) -> Output:
        """The completion. After `kill_after` chunks the verifier that decides it is killed, and started again."""
        text, num_chunks = "", 0
        token_ids: list[int] = []
        restarting: asyncio.Task[None] | None = None
        async with aclosing(self.client.generate(flags)) as responses:
            async for response in responses:
                text += response.text
                token_ids += response.token_ids
                num_chunks += 1
                if num_chunks == kill_after:
                    verifier = await self._busy_verifier()
                    verifier.kill()
                    await verifier.wait()
                    restarting = asyncio.create_task(verifier.start()) if restarts else None
        assert kill_after is None or num_chunks > kill_after, f"over after {num_chunks} chunks"
        if restarting is not None:
            await restarting
        return Output(text, tuple(token_ids), response.completion)

    async def until_all_serve(self) -> None:
        for verifier in self.stack.verifiers:
            await verifier.wait_serving(60)

    async def _busy_verifier(self) -> ServiceProcess:
        for verifier in self.stack.verifiers:
            async with open_channel(verifier.address) as channel:
                stub: verifier_pb2_grpc.VerifierServiceAsyncStub = verifier_pb2_grpc.VerifierServiceStub(channel)
                info = await stub.GetVerifierInfo(verifier_pb2.GetVerifierInfoRequest(), timeout=5)
            if info.kv.num_sessions > 0:
                return verifier
        raise AssertionError("no verifier has the session: the stream was over too soon")


@asynccontextmanager
async def running(settings: StackSettings) -> AsyncIterator[Running]:
    async with ServiceStack(settings, lambda role, line: None) as stack, GatewayClient(stack.gateway_address) as client:
        yield Running(stack, client)


async def check_kills(cluster: Running, flags: GenerateFlags, kill_points: tuple[int, ...]) -> None:
    whole = await cluster.generate(flags)
    assert whole.num_failures == 0
    for kill_after in kill_points:
        disturbed = await cluster.generate(flags, kill_after)
        assert disturbed.said == whole.said, kill_after
        assert disturbed.num_failures >= 1
        assert disturbed.completion.usage == whole.completion.usage
        assert disturbed.completion.finish_reason == whole.completion.finish_reason
        await cluster.until_all_serve()


@pytest.fixture
def settings(base_folder: Path, draft_folder: Path) -> StackSettings:
    return StackSettings(base_folder, draft_folder, num_verifiers=2, flags=FLAGS)


@pytest.mark.timeout(400)
async def test_another_replica_goes_on_where_one_was_killed(settings: StackSettings) -> None:
    async with running(settings) as cluster:
        whole, greedy = await cluster.generate(SAMPLED), await cluster.generate(GREEDY)
        disturbed = await cluster.generate(SAMPLED, kill_after=3, restarts=False)
        assert disturbed.said == whole.said
        assert (disturbed.num_failures, whole.num_failures) == (1, 0)
        # The survivor alone is enough.
        assert (await cluster.generate(GREEDY)).said == greedy.said


@pytest.mark.slow
async def test_a_stream_leaves_a_verifier_that_hangs(settings: StackSettings) -> None:
    """Stopped, not ended: its connections stay, and nothing says that it is gone."""
    async with running(settings) as cluster:
        whole = await cluster.generate(GREEDY)
        token_ids: list[int] = []
        longest_s, last_s, hung = 0.0, time.monotonic(), None
        async with aclosing(cluster.client.generate(GREEDY)) as responses:
            async for response in responses:
                longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
                token_ids += response.token_ids
                if len(token_ids) > 10 and hung is None:
                    hung = await cluster._busy_verifier()
                    os.kill(hung.pid, signal.SIGSTOP)
        assert hung is not None
        os.kill(hung.pid, signal.SIGCONT)
        assert tuple(token_ids) == whole.token_ids
        assert 1.0 < longest_s < 15.0


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_killed_at_many_points(settings: StackSettings) -> None:
    async with running(settings) as cluster:
        for flags in (GREEDY, SAMPLED, replace(SAMPLED, is_drafting=False)):
            await check_kills(cluster, flags, (1, 2, 4, 8, 16))


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_single_verifier_that_is_started_again(settings: StackSettings) -> None:
    async with running(replace(settings, num_verifiers=1)) as cluster:
        for flags in (GREEDY, SAMPLED):
            await check_kills(cluster, flags, (1, 6))


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_many_streams_at_once_survive_both_verifiers_in_turn(settings: StackSettings) -> None:
    flags = [replace(SAMPLED, sampling=SamplingFlags(seed=seed, temperature=0.8)) for seed in range(6)]
    async with running(settings) as cluster:
        expected = [await cluster.generate(one) for one in flags]
        streams = [asyncio.create_task(cluster.generate(one)) for one in flags]
        for verifier in cluster.stack.verifiers:
            await asyncio.sleep(0.2)
            verifier.kill()
            await verifier.wait()
            await verifier.start()
            await verifier.wait_serving(60)
        outputs = await asyncio.gather(*streams)
        assert [output.said for output in outputs] == [output.said for output in expected]
        assert sum(output.num_failures for output in outputs) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_the_bundled_pair() -> None:
    """In its default type, with threads as they come."""
    flags = {"gateway": FLAGS["gateway"]}
    stop = StopConditions(600, ignore_eos=True)  # it repeats itself, and then a chunk has up to 17 tokens
    async with running(StackSettings(num_verifiers=2, flags=flags)) as cluster:
        for one in (GREEDY, SAMPLED):
            await check_kills(cluster, replace(one, stop=stop), (2, 7, 20))
