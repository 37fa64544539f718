"""Both roles on several ranks under torchrun: the text of one rank."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from easyspec.cli.clients import Completion, GatewayClient, GenerateFlags, SamplingFlags
from easyspec.cli.processes import ServiceStack, StackSettings
from easyspec.speculation.parameters import StopConditions

GREEDY = GenerateFlags(
    "def fibonacci(n):", SamplingFlags(seed=7, temperature=0.0), StopConditions(24, ignore_eos=True), num_nodes=15
)
SAMPLED = replace(GREEDY, sampling=SamplingFlags(seed=7, temperature=0.8))
PROMPTS = [f"{word} {index}" for index in range(10) for word in ("class", "def", "import", "return", "the")]
# A draft over gloo on busy cores takes its time.
FLAGS = {"gateway": ("--draft-deadline-ms", "60000")}


@dataclass(frozen=True)
class Completed:
    """What a client saw."""

    token_ids: tuple[int, ...]
    completion: Completion


@dataclass(frozen=True)
class Running:
    """A client of a gateway in front of both roles."""

    client: GatewayClient

    async def generate(self, flags: GenerateFlags) -> Completed:
        token_ids: list[int] = []
        async with aclosing(self.client.generate(flags)) as responses:
            async for response in responses:
                token_ids += response.token_ids
        return Completed(tuple(token_ids), response.completion)


@asynccontextmanager
async def running(base: Path, draft: Path, num_ranks: dict[str, int]) -> AsyncIterator[Running]:
    settings = StackSettings(base, draft, num_ranks=num_ranks, flags=FLAGS)
    async with ServiceStack(settings, lambda role, line: None) as stack, GatewayClient(stack.gateway_address) as client:
        yield Running(client)


def requests() -> list[GenerateFlags]:
    """100: each of 50 prompts greedy and sampled."""
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
