"""Many requests at once, in too little memory: every one says what it says alone, and no slot is lost."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from easyspec.errors import CapacityError
from easyspec.speculation.messages import KvUsage, OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions, TreeBudget
from tests.conftest import started
from tests.engine_driver import GarbageDraftSession, Output, drafting, generate
from tests.fakes.checkpoints import VOCAB_SIZE
from tests.fakes.servers import eventually
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

NUM_STREAMS = 64
BUDGET = TreeBudget(num_levels=3, width=2, num_nodes=8)


@pytest.fixture(scope="module")
def reference(base_folder: Path) -> Iterator[VerifierEngine]:
    """Has room for all, and shares nothing."""
    settings = VerifierSettings(model=str(base_folder), num_threads=1, num_kv_slots=4096, share_prefixes=False)
    engine = VerifierEngine(settings)
    with started(engine):
        yield engine


@asynccontextmanager
async def small_verifier(base_folder: Path, **changes: Any) -> AsyncIterator[VerifierEngine]:
    values = {"num_kv_slots": 450, "max_tree_nodes": 24, "prefill_chunk": 48, "max_batch_rows": 128}
    values |= {"max_waiting_sessions": NUM_STREAMS, "admission_timeout_s": 120.0}
    engine = VerifierEngine(VerifierSettings(model=str(base_folder), num_threads=1, **(values | changes)))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def requests(rng: random.Random, count: int) -> list[OpenVerification]:
    """Prompts of all lengths, many of which begin like others, with parameters of all kinds."""
    beginnings = [tuple(rng.randrange(VOCAB_SIZE) for _ in range(length)) for length in (0, 40, 70, 127, 130, 150)]
    beginnings.append(beginnings[3] + beginnings[1])
    return [
        OpenVerification(
            rng.choice(beginnings) + tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 9, 30]))),
            SamplingParameters(
                rng.randrange(2**32),
                rng.choice([0.0, 0.3, 0.9]),
                top_k=rng.choice([None, 5]),
                frequency_penalty=rng.choice([0.0, 0.4]),
            ),
            StopConditions(rng.choice([1, 3, 8, 14, 60])),
        )
        for _ in range(count)
    ]


async def truth(reference: VerifierEngine, asked: list[OpenVerification]) -> list[Output]:
    return [await generate(reference, one) for one in asked]


def nothing_is_held(usage: KvUsage) -> bool:
    return usage.num_sessions == usage.num_used_slots == 0


async def test_every_stream_says_what_it_says_alone(reference: VerifierEngine, base_folder: Path) -> None:
    """Random arrivals, trees of random quality, some clients that go away, and memory for a tenth of it all."""
    rng = random.Random(0)
    asked = requests(rng, NUM_STREAMS)
    expected = await truth(reference, asked)
    is_cancelled = [rng.random() < 0.2 for _ in asked]

    async def run(engine: VerifierEngine, index: int) -> Output:
        await asyncio.sleep(rng.random() * 0.5)
        truth = asked[index].prompt_token_ids + expected[index].token_ids
        garbage = GarbageDraftSession(truth, VOCAB_SIZE, rng.random(), index)
        return await generate(engine, asked[index], garbage if rng.random() < 0.7 else None)

    async with small_verifier(base_folder) as engine:
        tasks = [asyncio.ensure_future(run(engine, index)) for index in range(NUM_STREAMS)]
        for index, task in enumerate(tasks):
            if is_cancelled[index]:
                asyncio.get_running_loop().call_later(rng.random(), task.cancel)
        outputs = await asyncio.gather(*tasks, return_exceptions=True)
        num_compared = 0
        for output, alone, may_be_cancelled in zip(outputs, expected, is_cancelled, strict=True):
            if isinstance(output, asyncio.CancelledError) and may_be_cancelled:
                continue
            assert isinstance(output, Output), output
            assert output.said == alone.said
            num_compared += 1
        assert num_compared >= NUM_STREAMS * 0.6
        await eventually(lambda: nothing_is_held(engine.kv_usage()))
        usage = engine.kv_usage()
        assert usage.num_preemptions > 0
        assert usage.num_prefix_hit_tokens > 0
        assert 0 < usage.num_cached_slots <= usage.num_slots
        # All slots can still be had: one text as long as the memory allows.
        whole = OpenVerification((1,) * 240, SamplingParameters(seed=1), StopConditions(8, ignore_eos=True))
        assert len((await generate(engine, whole)).token_ids) == 8


async def test_drafts_that_come_and_go_change_no_token(
    reference: VerifierEngine, base_folder: Path, draft_folder: Path
) -> None:
    """The drafter's memory is too small as well: sessions lose theirs, and go on plainly."""
    rng = random.Random(100)
    asked = requests(rng, 24)
    expected = await truth(reference, asked)
    drafter = DrafterEngine(
        DrafterSettings(model=str(draft_folder), num_threads=1, num_kv_slots=500, max_tree_nodes=24, prefill_chunk=32)
    )
    await drafter.start()
    num_without = 0

    async def run(engine: VerifierEngine, index: int) -> Output:
        nonlocal num_without
        await asyncio.sleep(rng.random() * 0.3)
        try:
            async with drafting(drafter, asked[index]) as drafts:
                return await generate(engine, asked[index], drafts, BUDGET)
        except CapacityError:
            num_without += 1
            return await generate(engine, asked[index])

    async with small_verifier(base_folder) as engine:
        outputs = await asyncio.gather(*(run(engine, index) for index in range(len(asked))))
        assert [output.said for output in outputs] == [output.said for output in expected]
        assert sum(output.num_accepted for output in outputs) > 0
        assert num_without > 0
        await eventually(lambda: nothing_is_held(engine.kv_usage()) and nothing_is_held(drafter.kv_usage()))
    async with drafting(drafter, OpenVerification((1,) * 200, SamplingParameters(seed=1), StopConditions(8))):
        assert drafter.kv_usage().num_sessions == 1
    await drafter.stop()


async def test_overload_refuses_in_time_and_passes(reference: VerifierEngine, base_folder: Path) -> None:
    """Clients for three times the memory and the queue: who is let in is served right, the others know soon."""
    rng = random.Random(7)
    asked = requests(rng, 30)
    expected = [output.said for output in await truth(reference, asked)]
    num_served = 0
    refused_after_s: list[float] = []
    retry_after_s: set[float] = set()

    async def client(engine: VerifierEngine, index: int) -> None:
        nonlocal num_served
        for turn in range(3):
            number = (index + 7 * turn) % len(asked)
            started_s = time.monotonic()
            try:
                assert (await generate(engine, asked[number])).said == expected[number]
                num_served += 1
            except CapacityError as error:
                refused_after_s.append(time.monotonic() - started_s)
                retry_after_s.add(error.retry_after_s)
                await asyncio.sleep(0.05)

    changes = {"num_kv_slots": 300, "max_waiting_sessions": 4, "admission_timeout_s": 0.2}
    async with small_verifier(base_folder, **changes) as engine:
        await asyncio.gather(*(client(engine, index) for index in range(30)))
        assert num_served > 0
        assert len(refused_after_s) > 0
        assert max(refused_after_s) < 5.0  # 0.2, and a busy machine
        assert retry_after_s == {0.2}
        await eventually(lambda: nothing_is_held(engine.kv_usage()))
        assert [(await generate(engine, one)).said for one in asked[:3]] == expected[:3]


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_soak(reference: VerifierEngine, base_folder: Path, draft_folder: Path) -> None:
    """EASYSPEC_SOAK_S seconds (300 if unset) of arrivals, cancellations, preemptions and evictions."""
    rng = random.Random(11)
    duration_s = float(os.environ.get("EASYSPEC_SOAK_S", "300"))
    asked = requests(rng, 100)
    expected = [output.said for output in await truth(reference, asked)]
    drafter = DrafterEngine(DrafterSettings(model=str(draft_folder), num_threads=1, num_kv_slots=600))
    await drafter.start()
    ends_at_s = time.monotonic() + duration_s
    samples: list[int] = []
    num_done = 0

    async def one(engine: VerifierEngine, number: int) -> None:
        try:
            async with drafting(drafter, asked[number]) as drafts:
                assert (await generate(engine, asked[number], drafts, BUDGET)).said == expected[number]
        except CapacityError:
            assert (await generate(engine, asked[number])).said == expected[number]

    async def client(engine: VerifierEngine) -> None:
        nonlocal num_done
        while time.monotonic() < ends_at_s:
            number = rng.randrange(len(asked))
            task = asyncio.ensure_future(one(engine, number))
            if rng.random() < 0.2:
                asyncio.get_running_loop().call_later(rng.random() * 0.3, task.cancel)
            try:
                await task
            except asyncio.CancelledError:
                continue
            num_done += 1

    async def watch() -> None:
        while time.monotonic() < ends_at_s:
            await asyncio.sleep(duration_s / 50)
            samples.append(resident_bytes())

    async with small_verifier(base_folder) as engine:
        await asyncio.gather(watch(), *(client(engine) for _ in range(16)))
        await asyncio.sleep(5.0)  # for the steps under way, on a busy machine
        for usage in (engine.kv_usage(), drafter.kv_usage()):
            assert nothing_is_held(usage), usage
        assert engine.kv_usage().num_preemptions > 0
    await drafter.stop()
    assert num_done > duration_s
    third = len(samples) // 3
    growth = min(samples[-third:]) - min(samples[third : 2 * third])
    assert growth < 4 * 2**20, f"{growth / 2**20:.1f} MiB more in the last third than in the second"
