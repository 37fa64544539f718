"""Real services with real engines in one process: bad input, clients that go away, full memory, faults."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from drafter_service.server import DrafterServer
from easyspec.errors import CapacityError, ConfigurationError, InvalidRequestError, InvalidTreeError
from easyspec.model.decoder import Decoder
from easyspec.rpc import convert
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.speculation.messages import Calibration, OpenSpeculation, OpenVerification
from easyspec.speculation.parameters import LayerPlanRequest, SamplingParameters, StopConditions, TreeBudget
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from easyspec.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
)
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from tests.fakes.checkpoints import VOCAB_SIZE
from tests.fakes.servers import eventually, serving
from tests.fakes.tiny_tokenizer import write_tokenizer
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine
from verifier_service.server import VerifierServer

Code = grpc.StatusCode
PROMPT = (3, 1, 4, 1, 5)
BUDGET = TreeBudget(3, 2, 8)
NUM_KV_SLOTS = 1024


@dataclass
class Services:
    """Verifier and drafter behind a gateway, and stubs of all three. `addresses` are by role."""

    verifier: VerifierEngine
    drafter: DrafterEngine
    addresses: dict[str, str]
    verifier_stub: Any
    drafter_stub: Any
    gateway_stub: Any

    def is_empty(self) -> bool:
        usages = (self.verifier.kv_usage(), self.drafter.kv_usage())
        return all((usage.num_used_slots, usage.num_sessions) == (0, 0) for usage in usages)

    def is_busy(self) -> bool:
        return all(engine.kv_usage().num_used_slots > 0 for engine in (self.verifier, self.drafter))


@asynccontextmanager
async def running(
    base: Path, draft: Path, tokenizer: Path, num_kv_slots: int = NUM_KV_SLOTS, **changes: Any
) -> AsyncIterator[Services]:
    verifier = VerifierEngine(VerifierSettings(model=str(base), num_threads=1, num_kv_slots=num_kv_slots, **changes))
    drafter = DrafterEngine(DrafterSettings(model=str(draft), num_threads=1, num_kv_slots=num_kv_slots, ask="always"))
    async with AsyncExitStack() as stack:
        addresses = {
            "verifier": await stack.enter_async_context(serving(VerifierServer(verifier))),
            "drafter": await stack.enter_async_context(serving(DrafterServer(drafter))),
        }
        settings = GatewaySettings(
            tokenizer=tokenizer,
            verifier_address=addresses["verifier"],
            drafter_address=addresses["drafter"],
            retry_first_ms=10,
            retry_max_ms=50,
            draft_deadline_ms=20_000,
        )
        addresses["gateway"] = await stack.enter_async_context(serving(GatewayServer(settings)))
        channels = {role: await stack.enter_async_context(open_channel(address)) for role, address in addresses.items()}
        yield Services(
            verifier,
            drafter,
            addresses,
            verifier_pb2_grpc.VerifierServiceStub(channels["verifier"]),
            drafter_pb2_grpc.DrafterServiceStub(channels["drafter"]),
            generation_pb2_grpc.GenerationServiceStub(channels["gateway"]),
        )


@pytest.fixture
async def services(base_folder: Path, draft_folder: Path) -> AsyncIterator[Services]:
    async with running(base_folder, draft_folder, base_folder) as services:
        yield services


def verify_open(max_tokens: int = 20, **fields: Any) -> verifier_pb2.VerifyRequest:
    defaults: dict[str, Any] = {
        "prompt_token_ids": PROMPT,
        "sampling": SamplingParameters(seed=1, temperature=0.5),
        "stop": StopConditions(max_tokens, ignore_eos=True),
    }
    return verifier_pb2.VerifyRequest(open=convert.open_verification_to_pb(OpenVerification(**(defaults | fields))))


def verify_tree(base_length: int, tree: TokenTree = EMPTY_TREE) -> verifier_pb2.VerifyRequest:
    return verifier_pb2.VerifyRequest(tree=convert.verify_tree_to_pb(base_length, tree))


def draft_open(**fields: Any) -> drafter_pb2.SpeculateRequest:
    defaults = {"prompt_token_ids": PROMPT, "sampling": SamplingParameters(seed=1), "max_total_length": 60}
    return drafter_pb2.SpeculateRequest(open=convert.open_speculation_to_pb(OpenSpeculation(**(defaults | fields))))


def calibration(base_length: int, *token_ids: int, budget: TreeBudget = BUDGET) -> drafter_pb2.SpeculateRequest:
    message = convert.calibration_to_pb(Calibration(base_length, token_ids or (9,), budget))
    return drafter_pb2.SpeculateRequest(calibration=message)


def generation(text: str = "def fib", max_tokens: int = 24, **sampling: Any) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest(text=text)
    request.stop.max_tokens = max_tokens
    request.stop.ignore_eos = True
    for name, value in ({"seed": 7, "temperature": 0.8} | sampling).items():
        setattr(request.sampling, name, value)
    return request


async def failure(method: Any, *requests: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [response async for response in method(iter(requests), timeout=20)]
    return caught.value


NAN = SamplingParameters(seed=1, temperature=float("nan"))
NEGATIVE = SamplingParameters(seed=1, temperature=-1.0)
BAD_VERIFICATIONS: list[tuple[list[Any], grpc.StatusCode, str]] = [
    ([verify_open(model="gpt-9")], Code.NOT_FOUND, "model 'gpt-9' is not served here"),
    ([verify_open(prompt_token_ids=())], Code.INVALID_ARGUMENT, "prompt_token_ids is []"),
    ([verify_open(prompt_token_ids=(1,) * 300)], Code.OUT_OF_RANGE, "prompt_token_ids is '300 tokens'"),
    ([verify_open(prompt_token_ids=(1, 5000))], Code.INVALID_ARGUMENT, "prompt_token_ids is 5000"),
    ([verify_open(sampling=NEGATIVE)], Code.INVALID_ARGUMENT, "sampling.temperature is -1.0"),
    ([verify_open(sampling=NAN)], Code.INVALID_ARGUMENT, "sampling.temperature is nan"),
    ([verify_open(), verify_tree(4)], Code.FAILED_PRECONDITION, "base_length is 4; the session stands at 5"),
    ([verify_open(), verify_tree(5, TokenTree((1, 2), (0, 2)))], Code.INVALID_ARGUMENT, "tree.parent_rows[1] is 2"),
    ([verify_open(), verify_tree(5, TokenTree((1, 1), (0, 0)))], Code.INVALID_ARGUMENT, "tree.token_ids[1] is 1"),
    ([verify_open(), verify_tree(5, TokenTree((5000,), (0,)))], Code.INVALID_ARGUMENT, "tree.token_ids[0] is 5000"),
    ([verify_open(), verify_tree(5, TokenTree((1,), ()))], Code.INVALID_ARGUMENT, "tree.parent_rows is '0 entries'"),
]
BAD_SPECULATIONS: list[tuple[list[Any], grpc.StatusCode, str]] = [
    ([draft_open(model="gpt-9")], Code.NOT_FOUND, "model 'gpt-9' is not served here"),
    ([draft_open(prompt_token_ids=())], Code.INVALID_ARGUMENT, "prompt_token_ids is []"),
    ([draft_open(prompt_token_ids=(1,) * 300)], Code.OUT_OF_RANGE, "prompt_token_ids is '300 tokens'"),
    ([draft_open(prompt_token_ids=(5000,))], Code.INVALID_ARGUMENT, "prompt_token_ids is 5000"),
    ([draft_open(sampling=NAN)], Code.INVALID_ARGUMENT, "sampling.temperature is nan"),
    ([draft_open(layer_plan=LayerPlanRequest(7))], Code.INVALID_ARGUMENT, "layer_parallel_size is 7"),
    ([draft_open(), calibration(4)], Code.FAILED_PRECONDITION, "base_length is 4; the session stands at 5"),
    ([draft_open(), calibration(5, 5000)], Code.INVALID_ARGUMENT, "calibration.token_ids is 5000"),
    ([draft_open(), calibration(5, budget=TreeBudget(65, 1, 8))], Code.INVALID_ARGUMENT, "budget.num_levels is 65"),
    ([draft_open(), calibration(5, budget=TreeBudget(3, 2, 999))], Code.INVALID_ARGUMENT, "budget.num_nodes is 999"),
]


async def test_bad_input_gets_its_own_status_and_other_streams_do_not_notice(services: Services) -> None:
    verifying, speculating = services.verifier_stub.Verify(timeout=60), services.drafter_stub.Speculate(timeout=60)
    await verifying.write(verify_open())
    await speculating.write(draft_open())
    base_length = len(PROMPT)
    for (verify_requests, verify_code, verify_message), (draft_requests, draft_code, draft_message) in zip(
        BAD_VERIFICATIONS, [*BAD_SPECULATIONS, BAD_SPECULATIONS[0]], strict=True
    ):
        error = await failure(services.verifier_stub.Verify, *verify_requests)
        assert (error.code(), verify_message in error.details()) == (verify_code, True), error.details()
        error = await failure(services.drafter_stub.Speculate, *draft_requests)
        assert (error.code(), draft_message in error.details()) == (draft_code, True), error.details()
        await verifying.write(verify_tree(base_length))
        token_ids = (await verifying.read()).verdict.token_ids
        await speculating.write(calibration(base_length, *token_ids))
        base_length += len(token_ids)
        assert (await speculating.read()).base_length == base_length
    assert services.verifier.kv_usage().num_sessions == services.drafter.kv_usage().num_sessions == 1
    verifying.cancel()
    speculating.cancel()
    await eventually(services.is_empty)


async def test_refusals_come_back_as_exceptions_that_name_the_field(services: Services) -> None:
    returned = error_from_rpc(await failure(services.verifier_stub.Verify, *BAD_VERIFICATIONS[7][0]))
    assert isinstance(returned, InvalidTreeError)
    assert (returned.field, repr(returned.value)) == ("tree.parent_rows[1]", "2")
    returned = error_from_rpc(await failure(services.drafter_stub.Speculate, *BAD_SPECULATIONS[9][0]))
    assert isinstance(returned, InvalidRequestError)
    assert (returned.field, repr(returned.value)) == ("budget.num_nodes", "999")


@pytest.mark.parametrize("how", ["cancel", "disconnect", "deadline"])
@pytest.mark.parametrize("prompt", ["def fib", "x" * 150])
async def test_a_client_that_goes_away_in_mid_stream_frees_both_services(
    services: Services, how: str, prompt: str
) -> None:
    async with open_channel(services.addresses["gateway"]) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(generation(prompt, max_tokens=90), timeout=0.7 if how == "deadline" else 60)
        await call.read()
        await call.read()
        assert services.is_busy()
        if how == "cancel":
            call.cancel()
        if how == "disconnect":
            await channel.close()
        await eventually(services.is_empty, within_s=1.7 if how == "deadline" else 1.0)


@pytest.mark.parametrize("role", ["verifier", "drafter"])
async def test_a_peer_whose_connection_breaks_frees_its_session(services: Services, role: str) -> None:
    channel = open_channel(services.addresses[role])
    if role == "verifier":
        call: Any = verifier_pb2_grpc.VerifierServiceStub(channel).Verify(timeout=60)
        requests: list[Any] = [verify_open(), verify_tree(5, TokenTree((1, 2), (0, 1)))]
        engine: Any = services.verifier
    else:
        call = drafter_pb2_grpc.DrafterServiceStub(channel).Speculate(timeout=60)
        requests, engine = [draft_open(), calibration(5)], services.drafter
    for request in requests:
        await call.write(request)
    await call.read()
    assert engine.kv_usage().num_used_slots > 0
    await channel.close()
    await eventually(services.is_empty)


async def test_full_memory_refuses_the_next_and_leaves_the_others_alone(base_folder: Path, draft_folder: Path) -> None:
    async with running(base_folder, draft_folder, base_folder, num_kv_slots=256, max_waiting_sessions=0) as services:
        streams = []
        for seed in range(2):
            call = services.verifier_stub.Verify(timeout=60)
            await call.write(verify_open(prompt_token_ids=tuple(range(seed, seed + 60))))
            await call.write(verify_tree(60))
            await call.read()
            streams.append(call)
        error = await failure(services.verifier_stub.Verify, verify_open(prompt_token_ids=(9,) * 60))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert "KV memory is full: 136 of 256 token slots free" in error.details()
        returned = error_from_rpc(error)
        assert isinstance(returned, CapacityError)
        assert returned.retry_after_s == 10.0
        for call in streams:
            await call.write(verify_tree(61))
            assert (await call.read()).verdict.base_length == 61
        streams.pop().cancel()
        await eventually(lambda: services.verifier.kv_usage().num_sessions == 1)
        call = services.verifier_stub.Verify(timeout=60)
        await call.write(verify_open(prompt_token_ids=(9,) * 60))
        await call.write(verify_tree(60))
        assert (await call.read()).verdict.base_length == 60
        for stream in [call, *streams]:
            stream.cancel()
        await eventually(services.is_empty)


async def texts(services: Services, request: generation_pb2.GenerateRequest) -> tuple[str, Any]:
    responses = [response async for response in services.gateway_stub.Generate(request, timeout=60)]
    return "".join(response.text for response in responses), responses[-1].completion


async def test_a_drafter_without_memory_costs_speed_and_nothing_else(base_folder: Path, draft_folder: Path) -> None:
    async with running(base_folder, draft_folder, base_folder, num_kv_slots=300) as services:
        request = generation()
        # On a busy machine the gateway might find that drafting does not pay.
        request.speculation.mode = generation_pb2.SpeculationParameters.MODE_ON
        text, completion = await texts(services, request)
        assert completion.speculation.num_accepted_tokens > 0
        hog = services.drafter_stub.Speculate(timeout=60)
        await hog.write(draft_open(prompt_token_ids=tuple(range(200)), max_total_length=236))
        await hog.write(calibration(200))
        await hog.read()
        for token_ids in ((1,) * 20, (2,) * 10):  # it grows until there is no room for another
            await hog.write(calibration(201 if token_ids[0] == 1 else 221, *token_ids))
            await hog.read()
        plain, completion = await texts(services, request)
        assert plain == text
        assert completion.speculation.num_accepted_tokens == 0
        assert completion.speculation.num_drafter_failures > 0
        hog.cancel()
        await eventually(services.is_empty)


async def test_a_fault_in_the_verifier_is_internal_and_it_lives_on(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = services.verifier_stub.Verify(timeout=60)
    await idle.write(verify_open())
    await idle.write(verify_tree(5))
    expected = list((await idle.read()).verdict.token_ids)
    forward = Decoder.forward

    def faulty(*_: Any) -> torch.Tensor:
        raise RuntimeError("device lost")

    monkeypatch.setattr(Decoder, "forward", faulty)
    error = await failure(services.verifier_stub.Verify, verify_open(), verify_tree(5, TokenTree((1,), (0,))))
    assert error.code() is Code.INTERNAL
    assert "device lost" not in error.details()
    monkeypatch.setattr(Decoder, "forward", forward)
    await idle.write(verify_tree(6))
    assert (await idle.read()).verdict.base_length == 6
    after = services.verifier_stub.Verify(timeout=60)
    await after.write(verify_open())
    await after.write(verify_tree(5))
    assert list((await after.read()).verdict.token_ids) == expected
    idle.cancel()
    after.cancel()
    await eventually(services.is_empty)


@pytest.mark.parametrize("drafts_ahead", [False, True])
async def test_a_fault_in_the_drafter_does_not_reach_the_client(
    services: Services, monkeypatch: pytest.MonkeyPatch, drafts_ahead: bool
) -> None:
    request = generation()
    request.speculation.draft_ahead = drafts_ahead
    # Otherwise the gateway may rest its drafter, and the drafter its model, which depends on the clock.
    request.speculation.mode = generation_pb2.SpeculationParameters.MODE_ON
    request.speculation.sources.append(types_pb2.DRAFT_SOURCE_MODEL)
    text, _ = await texts(services, request)
    num_calls = 0
    forward = Decoder.forward

    def faulty(decoder: Decoder, layout: Any, pool: Any, plan: Any = None, *rest: Any, **named: Any) -> torch.Tensor:
        nonlocal num_calls
        num_calls += plan is not None  # the drafter alone names a plan
        if plan is not None and num_calls == 7:
            raise RuntimeError("device lost")
        return forward(decoder, layout, pool, plan, *rest, **named)

    monkeypatch.setattr(Decoder, "forward", faulty)
    faulted, completion = await texts(services, request)
    assert faulted == text
    assert num_calls >= 7
    # A pass ahead of a verdict that fails costs its guesses, not the session.
    assert completion.speculation.num_drafter_failures in ([0, 1] if drafts_ahead else [1])
    await eventually(services.is_empty)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_text_is_the_same_with_any_plan_and_width_and_without_a_drafter(
    services: Services, temperature: float
) -> None:
    request = generation(temperature=temperature)
    request.speculation.mode = generation_pb2.SpeculationParameters.MODE_OFF
    plain, completion = await texts(services, request)
    assert completion.speculation.num_draft_tokens == 0
    assert plain
    for size, width in ((1, 1), (2, 4), (4, 8), (6, 3)):
        request = generation(temperature=temperature)
        request.speculation.sources.append(types_pb2.DRAFT_SOURCE_MODEL)  # text is guessed as it is with any plan
        request.speculation.mode = generation_pb2.SpeculationParameters.MODE_ON
        request.speculation.layer_plan.layer_parallel_size = size
        request.speculation.budget.num_levels, request.speculation.budget.width = 5, width
        request.speculation.budget.num_nodes = 24
        text, completion = await texts(services, request)
        assert text == plain
        assert completion.speculation.num_accepted_tokens > 0


async def test_tokenizers_that_do_not_fit_are_a_start_up_error_with_the_first_differences(
    base_folder: Path, draft_folder: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(draft_folder, tmp_path / "other"))
    write_tokenizer(other, VOCAB_SIZE - 20)
    for role, base, draft in (("drafter", base_folder, other), ("verifier", other, base_folder)):
        with pytest.raises(
            ConfigurationError, match=f"the {role} has another tokenizer: tokenizer [0-9a-f]{{64}}, the gate.*differing"
        ):
            async with running(base, draft, base_folder):
                pytest.fail("started")


async def test_a_request_says_who_guesses_and_learns_who_was_right(services: Services) -> None:
    """With any sources the same tokens; the statistics name exactly the sources that were asked."""

    async def generate(*sources: types_pb2.DraftSource.ValueType) -> tuple[list[int], generation_pb2.Completion]:
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=PROMPT),
            sampling=types_pb2.SamplingParameters(seed=1, temperature=0.5),
            stop=types_pb2.StopConditions(max_tokens=20, ignore_eos=True),
            speculation=generation_pb2.SpeculationParameters(
                mode=generation_pb2.SpeculationParameters.MODE_ON, sources=sources
            ),
        )
        messages = [message async for message in services.gateway_stub.Generate(request, timeout=30)]
        return [token_id for message in messages for token_id in message.token_ids], messages[-1].completion

    model, retrieval, ngram = (
        types_pb2.DRAFT_SOURCE_MODEL,
        types_pb2.DRAFT_SOURCE_RETRIEVAL,
        types_pb2.DRAFT_SOURCE_NGRAM,
    )
    expected, completion = await generate(model)
    assert [entry.source for entry in completion.speculation.sources] == [model]
    assert completion.speculation.sources[0].num_draft_tokens == completion.speculation.num_draft_tokens
    assert completion.speculation.sources[0].num_accepted_tokens == completion.speculation.num_accepted_tokens
    for sources in ([], [retrieval], [model, ngram], [ngram, retrieval, model]):
        token_ids, completion = await generate(*sources)
        assert token_ids == expected
        assert completion.speculation.num_drafter_failures == 0
        assert {entry.source for entry in completion.speculation.sources} <= set(sources or [model, retrieval, ngram])
    token_ids, completion = await generate(types_pb2.DRAFT_SOURCE_EARLY_EXIT)
    assert token_ids == expected  # plainly: this draft model has no exits
    assert not completion.speculation.sources
    info = await services.drafter_stub.GetDrafterInfo(drafter_pb2.GetDrafterInfoRequest(), timeout=10)
    assert list(info.sources) == [model, retrieval, ngram]
