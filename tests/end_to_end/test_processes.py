"""The product as it is run: three processes, text byte-identical whatever the drafter does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from easyspec.cli.clients import Completion, GatewayClient, GenerateFlags, SamplingFlags, are_peers_ready
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT, ServiceProcess, ServiceStack, StackSettings
from easyspec.speculation.parameters import LayerPlanRequest, MlpPlacement, StopConditions

PROMPT = "def fibonacci(n):"
# A named tree is drafted in every round; otherwise the gateway might just be trying how fast it is without.
GREEDY = GenerateFlags(
    PROMPT, SamplingFlags(seed=7, temperature=0.0), StopConditions(60, ignore_eos=True), num_nodes=15
)
SAMPLED = replace(GREEDY, sampling=SamplingFlags(seed=7, temperature=0.8))
ONE_THREAD = dict.fromkeys(("verifier", "drafter"), ("--num-threads", "1"))
# A lost drafter is looked for again soon.
FLAGS = ONE_THREAD | {"gateway": ("--retry-first-ms", "20", "--retry-max-ms", "100", "--draft-deadline-ms", "20000")}


@dataclass(frozen=True)
class Running:
    """The processes, and a client of the gateway."""

    stack: ServiceStack
    client: GatewayClient

    async def generate(self, flags: GenerateFlags, kill_after: int | None = None) -> tuple[str, Completion]:
        """The completion; after `kill_after` chunks the drafter is killed with SIGKILL."""
        text, num_chunks = "", 0
        async with aclosing(self.client.generate(flags)) as responses:
            async for response in responses:
                text += response.text
                num_chunks += 1
                if num_chunks == kill_after:
                    await self.kill_drafter()
        return text, response.completion

    @property
    def drafter(self) -> ServiceProcess:
        assert self.stack.drafter is not None
        return self.stack.drafter

    async def kill_drafter(self) -> None:
        self.drafter.kill()
        await self.drafter.wait()

    async def until_the_drafter_is_used(self) -> None:
        async with asyncio.timeout(20):
            while not await are_peers_ready(self.stack.gateway_address):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@asynccontextmanager
async def running(settings: StackSettings) -> AsyncIterator[Running]:
    async with ServiceStack(settings, lambda role, line: None) as stack, GatewayClient(stack.gateway_address) as client:
        yield Running(stack, client)


async def check_a_killed_drafter_changes_nothing(pair: Running, flags: GenerateFlags) -> None:
    whole, completion = await pair.generate(flags)
    assert completion.speculation.num_accepted_tokens > 0
    killed, completion = await pair.generate(flags, kill_after=4)
    assert killed == whole
    assert completion.speculation.num_drafter_failures > 0
    assert completion.speculation.num_draft_rounds < completion.speculation.num_rounds - 5
    without, completion = await pair.generate(flags)
    assert without == whole
    assert completion.speculation.num_draft_rounds == 0
    await pair.drafter.start()
    await pair.drafter.wait_serving(60.0)
    await pair.until_the_drafter_is_used()
    again, completion = await pair.generate(flags)
    assert again == whole
    assert completion.speculation.num_accepted_tokens > 0


@pytest.fixture
def settings(base_folder: Path, draft_folder: Path) -> StackSettings:
    return StackSettings(base_folder, draft_folder, flags=FLAGS)


async def test_a_drafter_killed_in_mid_stream_changes_nothing_and_is_used_again(settings: StackSettings) -> None:
    async with running(settings) as pair:
        plain, _ = await pair.generate(replace(SAMPLED, is_drafting=False))
        assert (await pair.generate(SAMPLED))[0] == plain
        await check_a_killed_drafter_changes_nothing(pair, replace(SAMPLED, stop=StopConditions(150, ignore_eos=True)))


async def test_a_drafter_killed_while_it_drafts_ahead_changes_nothing(settings: StackSettings) -> None:
    """It goes on with the next tree as soon as one is sent, so that at any chunk whose tree was drafted ahead it is
    at work on the next."""
    flags = replace(SAMPLED, stop=StopConditions(150, ignore_eos=True))
    async with running(settings) as pair:
        whole, completion = await pair.generate(flags)
        assert completion.speculation.num_ahead_hits + completion.speculation.num_ahead_misses > 0
        text, is_killed = "", False
        async with aclosing(pair.client.generate(flags)) as responses:
            async for response in responses:
                text += response.text
                if not is_killed and response.timings.HasField("ahead_ns"):
                    await pair.kill_drafter()
                    is_killed = True
        assert is_killed
        assert text == whole
        assert response.completion.speculation.num_drafter_failures > 0


@pytest.mark.slow
async def test_a_stack_without_a_drafter_says_the_same(settings: StackSettings) -> None:
    async with running(settings) as pair, running(replace(settings, draft=None)) as alone:
        for flags in (GREEDY, SAMPLED):
            assert (await pair.generate(flags))[0] == (await alone.generate(flags))[0]


async def check_every_way_of_drafting(pair: Running, num_layers: int) -> None:
    sizes = sorted({1, 2, 3, 4, 6, num_layers})
    for flags in (GREEDY, SAMPLED):
        plain, completion = await pair.generate(replace(flags, is_drafting=False))
        assert completion.speculation.num_draft_rounds == 0
        for size in sizes:
            for mlp in MlpPlacement:
                plan = LayerPlanRequest(size, mlp)
                text, completion = await pair.generate(replace(flags, layer_plan=plan, tree_width=1 + size % 8))
                assert text == plain, plan
                assert completion.speculation.num_draft_rounds > 0
        for width in (1, 2, 8):
            text, completion = await pair.generate(replace(flags, tree_width=width, num_nodes=4 * width))
            assert text == plain, width
        ablation = LayerPlanRequest(4, MlpPlacement.STAGED, calibration=False)
        assert (await pair.generate(replace(flags, layer_plan=ablation)))[0] == plain


@pytest.mark.slow
async def test_every_plan_and_width_says_the_same(settings: StackSettings) -> None:
    async with running(settings) as pair:
        await check_every_way_of_drafting(pair, num_layers=6)


bundled = pytest.mark.skipif(
    not ((DEFAULT_BASE / "config.json").exists() and (DEFAULT_DRAFT / "config.json").exists()),
    reason="the bundled pair has not been trained here",
)


@bundled
@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_the_bundled_pair_says_the_same_in_every_way() -> None:
    """In its default type, with threads as they come: what `easyspec generate` promises."""
    flags = {"gateway": FLAGS["gateway"]}
    async with running(StackSettings(flags=flags)) as pair:
        draft = (await pair.client.info()).draft_model
        await check_every_way_of_drafting(pair, draft.num_layers)
        for one in (GREEDY, SAMPLED):
            await check_a_killed_drafter_changes_nothing(pair, replace(one, stop=StopConditions(120, ignore_eos=True)))
