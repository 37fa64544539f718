"""Steps for which there is no memory, and sessions that go while their prompts are read with others'."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from easyspec.engine.device_thread import Task
from easyspec.errors import CapacityError
from easyspec.model.decoder import Decoder, PassResult
from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.model.row_layout import RowLayout
from easyspec.ops.kv_pool import KVPool
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE
from tests.engine_driver import generate
from tests.fakes.servers import eventually
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine
from verifier_service.scheduler import ScheduledSession, Scheduler, SchedulerLimits

POISON = 77
ERRORS = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")]


def asked(first: int) -> OpenVerification:
    return OpenVerification((first, 1, 4, 1, 5), SamplingParameters(seed=1), StopConditions(8, ignore_eos=True))


@pytest.fixture
async def engine(base_folder: Path) -> AsyncIterator[VerifierEngine]:
    settings = VerifierSettings(model=str(base_folder), num_threads=1, num_kv_slots=512, max_tree_nodes=16)
    engine = VerifierEngine(settings)
    await engine.start()
    yield engine
    await engine.stop()


@pytest.mark.parametrize("error", ERRORS)
async def test_a_request_for_which_there_is_no_memory_is_refused_alone(
    engine: VerifierEngine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    alone = [await generate(engine, asked(first)) for first in range(3)]
    forward, sizes = Decoder.forward, []

    def failing(self: Decoder, layout: RowLayout, *arguments: Any, **named: Any) -> PassResult:
        sizes.append(len(layout.segments))
        if POISON in layout.rows.token_ids:
            raise error
        return forward(self, layout, *arguments, **named)

    monkeypatch.setattr(Decoder, "forward", failing)
    outputs = await asyncio.gather(
        *(generate(engine, asked(first)) for first in (0, 1, 2, POISON)), return_exceptions=True
    )
    assert isinstance(outputs[3], CapacityError)
    assert [output.token_ids for output in outputs[:3]] == [output.token_ids for output in alone]  # type: ignore[union-attr]
    await eventually(lambda: engine.kv_usage().num_sessions == 0)
    assert engine.kv_usage().num_used_slots == 0


async def test_a_batch_for_which_there_is_no_memory_is_computed_one_by_one(
    engine: VerifierEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [await generate(engine, asked(first)) for first in range(4)]
    forward, num_failures = Decoder.forward, [0]

    def failing(self: Decoder, layout: RowLayout, *arguments: Any, **named: Any) -> PassResult:
        if len(layout.segments) > 1:
            num_failures[0] += 1
            raise MemoryError
        return forward(self, layout, *arguments, **named)

    monkeypatch.setattr(Decoder, "forward", failing)
    outputs = await asyncio.gather(*(generate(engine, asked(first)) for first in range(4)))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in alone]
    assert num_failures[0] > 0


def reading(num_sessions: int, num_tokens: int) -> tuple[Scheduler[ScheduledSession], list[ScheduledSession], KvMemory]:
    """Sessions whose prompts are one piece on the side, while another one decodes."""
    memory = KvMemory(KVPool(1, 1, 16, 4096, torch.float32, torch.device("cpu")), shares_prefixes=True)
    limits = SchedulerLimits(512, 512, 4, 8, 1.0, 1.7)
    scheduler: Scheduler[ScheduledSession] = Scheduler(memory, limits)

    def open_one(token_ids: Sequence[int]) -> ScheduledSession:
        session = ScheduledSession(len(opened) + 1, [*token_ids], SessionSlots(memory), takes_prefixes=True)
        opened.append(session)
        scheduler.open(session, Task())
        return session

    opened: list[ScheduledSession] = []
    decoding = open_one([1, 2])
    for _ in range(3):
        scheduler.submit(decoding, EMPTY_TREE)
        scheduler.computed(scheduler.plan(), 1_000_000)
        decoding.token_ids.append(3)
    for number in range(num_sessions):
        scheduler.submit(open_one([10 + number] * num_tokens), EMPTY_TREE)
    scheduler.submit(decoding, EMPTY_TREE)
    scheduler.plan()
    assert scheduler.piece is not None
    return scheduler, opened[1:], memory


def test_a_prompt_that_is_cancelled_takes_nothing_from_others_that_are_read_with_it() -> None:
    scheduler, (going, staying), memory = reading(2, 700)
    piece = scheduler.piece
    assert piece is not None
    num_slots = {work.session: len(work.slots) for work in piece}
    assert set(num_slots) == {going, staying}
    scheduler.close(going.session_id)
    assert scheduler.piece is piece
    num_used = memory.num_used_slots
    scheduler.piece_advanced(1, 1_000_000, is_computed=True)
    assert staying.slots.num_cached == num_slots[staying]
    assert going.slots.num_cached == 0
    assert memory.num_used_slots == num_used - num_slots[going]
    assert SessionSlots(memory).take_prefix(going.token_ids) == num_slots[going], "what it has read is there for others"


def test_a_piece_that_nobody_waits_for_is_dropped() -> None:
    scheduler, sessions, memory = reading(2, 700)
    num_used = memory.num_used_slots
    num_own = sum(session.slots.num_cached for session in sessions)
    for session in sessions:
        scheduler.close(session.session_id)
    assert scheduler.piece is None
    assert memory.num_used_slots == num_used - num_own


def test_a_step_that_breaks_frees_what_cancelled_sessions_still_had_in_a_piece() -> None:
    scheduler, (going, staying), memory = reading(2, 700)
    scheduler.close(going.session_id)
    scheduler.abandon()
    scheduler.close(staying.session_id)
    scheduler.close(1)
    assert memory.num_used_slots == 0
    assert SessionSlots(memory).take_prefix(going.token_ids) == 0, "it was never computed"
