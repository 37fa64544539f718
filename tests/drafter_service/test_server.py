"""The drafter's wire: a real server, a real channel, an engine without a model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc
import pytest

from drafter_service.server import DrafterEngine, DrafterServer
from easyspec import __version__
from easyspec.errors import CapacityError, InvalidRequestError, StalePositionError
from easyspec.rpc import convert
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.speculation.messages import Calibration, OpenSpeculation
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.v1 import drafter_pb2, drafter_pb2_grpc
from tests.fakes.engines import FakeDrafterEngine, next_token
from tests.fakes.servers import eventually, serving

Stub: TypeAlias = "drafter_pb2_grpc.DrafterServiceAsyncStub"
PROMPT = (5, 6, 7)


@pytest.fixture
async def engine() -> FakeDrafterEngine:
    return FakeDrafterEngine("draft")


@pytest.fixture
async def stub(engine: FakeDrafterEngine) -> AsyncIterator[Stub]:
    conforming: DrafterEngine = engine
    async with serving(DrafterServer(conforming)) as address, open_channel(address) as channel:
        yield drafter_pb2_grpc.DrafterServiceStub(channel)


def opening() -> drafter_pb2.SpeculateRequest:
    request = OpenSpeculation(PROMPT, SamplingParameters(seed=1))
    return drafter_pb2.SpeculateRequest(open=convert.open_speculation_to_pb(request))


def calibrating(base_length: int, *token_ids: int) -> drafter_pb2.SpeculateRequest:
    calibration = Calibration(base_length, token_ids, TreeBudget(num_levels=3, width=2, num_nodes=8))
    return drafter_pb2.SpeculateRequest(calibration=convert.calibration_to_pb(calibration))


def without(request: drafter_pb2.SpeculateRequest, field: str) -> drafter_pb2.SpeculateRequest:
    (request.open.sampling if field == "seed" else request.calibration).ClearField(field)
    return request


async def outcome(stub: Stub, *requests: drafter_pb2.SpeculateRequest) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        _ = [response async for response in stub.Speculate(iter(requests), timeout=5)]
    return failure.value


async def test_answers_every_calibration_with_a_tree_and_frees_the_session(
    stub: Stub, engine: FakeDrafterEngine
) -> None:
    call = stub.Speculate(timeout=5)
    await call.write(opening())
    await call.write(calibrating(3, 8))
    draft = convert.draft_from_pb(await call.read())
    assert draft.base_length == 4
    assert draft.tree.num_levels == 3
    assert next_token((*PROMPT, 8), 100) in draft.tree.children[0]
    assert draft.timings.num_fuzzy_steps == 3
    await call.write(calibrating(4, 9, 10))
    assert convert.draft_from_pb(await call.read()).base_length == 6
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK
    assert engine.kv_usage().num_sessions == 0


async def test_info_tells_model_memory_and_plan(stub: Stub, engine: FakeDrafterEngine) -> None:
    info = await stub.GetDrafterInfo(drafter_pb2.GetDrafterInfoRequest(), timeout=5)
    assert convert.model_info_from_pb(info.model) == engine.model_info
    assert convert.kv_usage_from_pb(info.kv) == engine.kv_usage()
    assert convert.layer_plan_from_pb(info.layer_plan) == engine.layer_plan
    assert (info.layer_groups, info.max_tree_nodes, info.version) == ("0 | 1-10 | 11", 16, __version__)


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([], "message"),
        ([drafter_pb2.SpeculateRequest()], "message"),
        ([calibrating(3, 8)], "message"),
        ([opening(), opening()], "message"),
        ([without(opening(), "seed")], "sampling.seed"),
        ([opening(), without(calibrating(3, 8), "budget")], "calibration.budget"),
    ],
)
async def test_a_stream_out_of_order_is_refused(
    stub: Stub, engine: FakeDrafterEngine, requests: list[drafter_pb2.SpeculateRequest], field: str
) -> None:
    returned = error_from_rpc(await outcome(stub, *requests))
    assert isinstance(returned, InvalidRequestError)
    assert returned.field == field
    await eventually(lambda: engine.kv_usage().num_sessions == 0)


async def test_a_stale_calibration_changes_no_other_stream(stub: Stub, engine: FakeDrafterEngine) -> None:
    healthy = stub.Speculate(timeout=5)
    await healthy.write(opening())
    await healthy.write(calibrating(3, 8))
    await healthy.read()
    assert isinstance(error_from_rpc(await outcome(stub, opening(), calibrating(2, 8))), StalePositionError)
    await healthy.write(calibrating(4, 9))
    assert (await healthy.read()).base_length == 5
    assert engine.kv_usage().num_sessions == 1
    healthy.cancel()


async def test_a_refusal_at_opening_holds_nothing(stub: Stub, engine: FakeDrafterEngine) -> None:
    engine.open_fault = CapacityError("no KV memory", retry_after_s=2.0)
    returned = error_from_rpc(await outcome(stub, opening()))
    assert isinstance(returned, CapacityError)
    assert returned.retry_after_s == 2.0
    assert engine.kv_usage().num_sessions == 0


async def test_a_client_that_disconnects_while_drafting_frees_its_session() -> None:
    engine = FakeDrafterEngine("draft")
    engine.step_gate.clear()
    async with serving(DrafterServer(engine)) as address:
        async with open_channel(address) as channel:
            call = drafter_pb2_grpc.DrafterServiceStub(channel).Speculate(timeout=5)
            await call.write(opening())
            await call.write(calibrating(3, 8))
            await eventually(lambda: "step" in engine.events)
            assert engine.kv_usage().num_sessions == 1
        await eventually(lambda: engine.kv_usage().num_sessions == 0)


async def test_a_client_that_says_nothing_frees_its_session() -> None:
    engine = FakeDrafterEngine("draft")
    async with (
        serving(DrafterServer(engine, session_idle_timeout_s=0.1)) as address,
        open_channel(address) as channel,
    ):
        call = drafter_pb2_grpc.DrafterServiceStub(channel).Speculate(timeout=5)
        await call.write(opening())
        await eventually(lambda: engine.kv_usage().num_sessions == 1)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert engine.kv_usage().num_sessions == 0
