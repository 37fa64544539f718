"""SIGKILL to a rank of either role in mid-stream: its group ends and is started again, the text stays the same."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from easyspec.cli.clients import Completion, GatewayClient, GenerateFlags, SamplingFlags, are_peers_ready
from easyspec.cli.processes import DRAFTER, VERIFIER, ServiceProcess, ServiceStack, StackSettings
from easyspec.speculation.parameters import StopConditions
from tests.fakes.processes import assert_none_left_with, ranks_under

NUM_RANKS = 2
NUM_KILLS = 20
# From SIGKILL to the end of the last process of the group.
GROUP_GONE_S = 10.0
READY_S = 120.0
REQUEST = GenerateFlags(
    "def fibonacci(n):", SamplingFlags(seed=7, temperature=0.8), StopConditions(120, ignore_eos=True), num_nodes=15
)
GATEWAY_FLAGS = ("--retry-first-ms", "20", "--retry-max-ms", "100", "--draft-deadline-ms", "60000")


@dataclass(frozen=True)
class Disturbed:
    """What a client saw of a stream in which a rank was killed, and how long the group took to end."""

    token_ids: tuple[int, ...]
    completion: Completion
    longest_pause_s: float
    group_gone_s: float


@dataclass(frozen=True)
class Running:
    """Both roles on several ranks each, a gateway, and a client of it."""

    stack: ServiceStack
    client: GatewayClient

    def launcher(self, role: str) -> ServiceProcess:
        process = self.stack.drafter if role == DRAFTER else self.stack.verifier
        assert process is not None
        return process

    async def generate(self) -> tuple[int, ...]:
        async with aclosing(self.client.generate(REQUEST)) as responses:
            return tuple([token_id async for response in responses for token_id in response.token_ids])

    async def generate_and_kill(self, role: str, after_chunks: int) -> Disturbed:
        """Kill rank 1 of `role` when so many chunks have come."""
        token_ids: list[int] = []
        pauses_s: list[float] = []
        ending: asyncio.Task[float] | None = None
        last_s = time.monotonic()
        async with aclosing(self.client.generate(REQUEST)) as responses:
            async for response in responses:
                pauses_s.append(time.monotonic() - last_s)
                last_s = time.monotonic()
                token_ids += response.token_ids
                if len(pauses_s) == after_chunks:
                    ending = asyncio.create_task(kill_rank_1(self.launcher(role).pid))
        assert ending is not None, "the stream was long enough"
        return Disturbed(tuple(token_ids), response.completion, max(pauses_s[after_chunks:]), await ending)

    async def until_all_serve(self) -> None:
        for role in (VERIFIER, DRAFTER):
            await self.launcher(role).wait_serving(READY_S)
        async with asyncio.timeout(READY_S):
            while not await are_peers_ready(self.stack.gateway_address):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


async def kill_rank_1(launcher_pid: int) -> float:
    """Seconds until every rank of the group had ended."""
    ranks = ranks_under(launcher_pid)
    assert [rank.rank for rank in ranks] == list(range(NUM_RANKS))
    killed_s = time.monotonic()
    os.kill(ranks[1].pid, signal.SIGKILL)
    return max(await asyncio.gather(*(rank.ended_s(killed_s, 5 * GROUP_GONE_S) for rank in ranks)))


def ignore(role: str, line: str) -> None: ...


@asynccontextmanager
async def running(base: Path, draft: Path, on_log: Callable[[str, str], None] = ignore) -> AsyncIterator[Running]:
    num_ranks = {VERIFIER: NUM_RANKS, DRAFTER: NUM_RANKS}
    settings = StackSettings(base, draft, num_ranks=num_ranks, flags={"gateway": GATEWAY_FLAGS})
    async with ServiceStack(settings, on_log) as stack, GatewayClient(stack.gateway_address) as client:
        yield Running(stack, client)


def check(disturbed: Disturbed, role: str, expected: tuple[int, ...]) -> None:
    assert disturbed.token_ids == expected
    assert disturbed.group_gone_s < GROUP_GONE_S
    speculation = disturbed.completion.speculation
    assert speculation.num_verifier_failures == (1 if role == VERIFIER else 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_twenty_kills_in_a_row(base_folder: Path, draft_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun starts the group again. Roles take turns in pairs, so that each is killed beside a whole and beside a
    restarting other; streams are at various places.
    """
    monkeypatch.setenv("PET_MAX_RESTARTS", str(NUM_KILLS))  # torchrun's --max-restarts
    roles = [role for pair in range(NUM_KILLS // 2) for role in (DRAFTER, VERIFIER)[:: 1 if pair % 2 else -1]]
    async with running(base_folder, draft_folder) as ranks:
        expected = await ranks.generate()
        for number, role in enumerate(roles):
            if number % 2 == 0:
                await ranks.until_all_serve()
            disturbed = await ranks.generate_and_kill(role, after_chunks=1 + number // 2)
            print(
                f"kill {number + 1}, {role}: group gone after {disturbed.group_gone_s:.2f} s, "
                f"longest pause {disturbed.longest_pause_s:.2f} s"
            )
            check(disturbed, role, expected)
        await ranks.until_all_serve()
        assert await ranks.generate() == expected
    assert_none_left_with(str(base_folder))
    assert_none_left_with(str(draft_folder))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_killed_rank_ends_torchrun_which_is_started_again(base_folder: Path, draft_folder: Path) -> None:
    """As `easyspec up` does it."""
    lines: list[str] = []
    async with running(base_folder, draft_folder, lambda role, line: lines.append(line)) as ranks:
        watching = asyncio.create_task(ranks.stack.watch())
        expected = await ranks.generate()
        for role in (DRAFTER, VERIFIER):
            await ranks.until_all_serve()
            launcher_pid = ranks.launcher(role).pid
            check(await ranks.generate_and_kill(role, after_chunks=2), role, expected)
            async with asyncio.timeout(READY_S):
                while ranks.launcher(role).pid == launcher_pid:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        await ranks.until_all_serve()
        assert await ranks.generate() == expected
        watching.cancel()
    assert sum("failed (exitcode: -9) local_rank: 1" in line for line in lines) == 2
