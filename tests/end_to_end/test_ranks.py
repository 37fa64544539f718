"""Both roles on several ranks under torchrun: the text of one rank, also when a rank is killed in mid-stream."""

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

from easyspec.cli.clients import Completion, GatewayClient, GenerateFlags, SamplingFlags, is_drafter_ready
from easyspec.cli.processes import ServiceProcess, ServiceStack, StackSettings
from easyspec.speculation.parameters import StopConditions

GREEDY = GenerateFlags(
    "def fibonacci(n):", SamplingFlags(seed=7, temperature=0.0), StopConditions(24, ignore_eos=True), num_nodes=15
)
SAMPLED = replace(GREEDY, sampling=SamplingFlags(seed=7, temperature=0.8))
LONG = replace(SAMPLED, stop=StopConditions(120, ignore_eos=True))
PROMPTS = [f"{word} {index}" for index in range(5) for word in ("class", "def", "import", "return", "the")]
# A lost role is looked for again soon; a draft over gloo on busy cores takes its time.
FLAGS = {"gateway": ("--retry-first-ms", "20", "--retry-max-ms", "100", "--draft-deadline-ms", "60000")}
# A group is down so soon after one of its ranks was killed.
GROUP_GONE_S = 10.0


@dataclass(frozen=True)
class Running:
    """The processes, and a client of the gateway."""

    stack: ServiceStack
    client: GatewayClient

    async def generate(self, flags: GenerateFlags, kill_after: int | None = None, role: str = "") -> Completed:
        """The completion; after `kill_after` chunks rank 1 of `role` is killed with SIGKILL."""
        token_ids: list[int] = []
        num_chunks = 0
        watching: asyncio.Task[float] | None = None
        async with aclosing(self.client.generate(flags)) as responses:
            async for response in responses:
                token_ids += response.token_ids
                num_chunks += 1
                if num_chunks == kill_after:
                    kill_rank_1(self.process(role))
                    watching = asyncio.create_task(restart_when_gone(self.process(role)))
        group_gone_s = await watching if watching is not None else None
        return Completed(tuple(token_ids), response.completion, group_gone_s)

    def process(self, role: str) -> ServiceProcess:
        process = self.stack.drafter if role == "drafter" else self.stack.verifiers[0]
        assert process is not None
        return process

    async def until_all_serve(self) -> None:
        for role in ("verifier", "drafter"):
            await self.process(role).wait_serving(120)
        async with asyncio.timeout(60):
            while not await is_drafter_ready(self.stack.gateway_address):  # noqa: ASYNC110
                await asyncio.sleep(0.1)


@dataclass(frozen=True)
class Completed:
    """What a client saw, and how long a group took to end after one of its ranks was killed."""

    token_ids: tuple[int, ...]
    completion: Completion
    group_gone_s: float | None = None


def kill_rank_1(launcher: ServiceProcess) -> None:
    """SIGKILL to the process that torchrun (`launcher`) started as rank 1."""
    for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), signal.SIGKILL)
            return
    raise AssertionError("torchrun has no rank 1")


async def restart_when_gone(launcher: ServiceProcess) -> float:
    """Wait until a role's whole group has ended, its launcher being the last, and start it again; seconds it took."""
    started_s = time.monotonic()
    async with asyncio.timeout(90):
        await launcher.wait()
    elapsed_s = time.monotonic() - started_s
    await launcher.start()
    return elapsed_s


@asynccontextmanager
async def running(base: Path, draft: Path, num_ranks: dict[str, int]) -> AsyncIterator[Running]:
    settings = StackSettings(base, draft, num_ranks=num_ranks, flags=FLAGS)
    async with ServiceStack(settings, lambda role, line: None) as stack, GatewayClient(stack.gateway_address) as client:
        yield Running(stack, client)


def requests() -> list[GenerateFlags]:
    """50: every prompt greedy and sampled."""
    return [
        replace(flags, prompt=prompt, sampling=replace(flags.sampling, seed=index))
        for index, prompt in enumerate(PROMPTS)
        for flags in (GREEDY, SAMPLED)
    ]


async def said_by_one_rank(base: Path, draft: Path) -> list[tuple[int, ...]]:
    async with running(base, draft, {}) as pair:
        return [(await pair.generate(flags)).token_ids for flags in requests()]


@pytest.fixture(scope="module")
def on_one_rank(base_folder: Path, draft_folder: Path) -> list[tuple[int, ...]]:
    """Made once, in an event loop of its own."""
    return asyncio.run(said_by_one_rank(base_folder, draft_folder))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_ranks", [2, 4])
async def test_ranks_say_what_one_says(
    base_folder: Path, draft_folder: Path, on_one_rank: list[tuple[int, ...]], num_ranks: int
) -> None:
    async with running(base_folder, draft_folder, {"verifier": num_ranks, "drafter": num_ranks}) as ranks:
        for flags, expected in zip(requests(), on_one_rank, strict=True):
            completed = await ranks.generate(flags)
            assert completed.token_ids == expected, flags
            assert completed.completion.speculation.num_drafter_failures == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_killed_rank_takes_its_group_down_and_streams_go_on(base_folder: Path, draft_folder: Path) -> None:
    """20 in a row, in turn of the drafter and of the verifier."""
    async with running(base_folder, draft_folder, {"verifier": 2, "drafter": 2}) as ranks:
        whole = await ranks.generate(LONG)
        for round_number in range(20):
            role = ("drafter", "verifier")[round_number % 2]
            disturbed = await ranks.generate(LONG, kill_after=1 + round_number // 4, role=role)
            assert disturbed.token_ids == whole.token_ids, (round_number, role)
            assert disturbed.group_gone_s is not None
            assert disturbed.group_gone_s < GROUP_GONE_S, (round_number, role)
            failures = disturbed.completion.speculation
            assert (failures.num_verifier_failures > 0) == (role == "verifier"), (round_number, role)
            await ranks.until_all_serve()
