"""The engine on its thread: acceptance with a real verifier, faults, and what does not start."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from drafter_service.model.drafting import ModelDrafting
from drafter_service.model.plan_choice import candidate_plans
from drafter_service.worth import Choice
from easyspec.errors import ConfigurationError, InvalidRequestError, UnavailableError
from easyspec.model.decoder import Decoder
from easyspec.speculation.messages import Calibration, OpenSpeculation, OpenVerification
from easyspec.speculation.parameters import (
    LayerPlanRequest,
    MlpPlacement,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)
from easyspec.speculation.sources import DraftSources
from tests.engine_driver import Output, drafting, generate
from tests.fakes.servers import eventually
from verifier_service.engine import VerifierEngine

PROMPT = (2, 3, 5, 7, 11, 13)
GREEDY = SamplingParameters(seed=0, temperature=0.0)
SAMPLED = SamplingParameters(seed=5, temperature=0.6)
BUDGET = TreeBudget(num_levels=4, width=2, num_nodes=16)
OPENING = OpenSpeculation(PROMPT, SAMPLED, max_total_length=60, sources=DraftSources.MODEL)


def settings(folder: Path, **changes: Any) -> DrafterSettings:
    return DrafterSettings(model=str(folder), num_threads=1, **({"num_kv_slots": 1024} | changes))


@pytest.fixture
async def engine(draft_folder: Path) -> AsyncIterator[DrafterEngine]:
    engine = DrafterEngine(settings(draft_folder, ask="always"))
    await engine.start()
    yield engine
    await engine.stop()


async def drafted(
    verifier: VerifierEngine, drafter: DrafterEngine, sampling: SamplingParameters, **plan: Any
) -> Output:
    request = OpenVerification(PROMPT, sampling, StopConditions(31, ignore_eos=True))
    async with drafting(drafter, request, LayerPlanRequest(**plan)) as drafts:
        # A chain of width 1 keeps all its candidates: 5 levels of 8.
        return await generate(verifier, request, drafts, TreeBudget(num_levels=5, width=1, num_nodes=40))


@pytest.mark.parametrize("ask", ["where-it-pays", "always"])
async def test_the_operator_may_have_everybody_asked(
    draft_folder: Path, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Choice, "is_worth_it", lambda self, kind, num_sharing=None: num_sharing is not None
    )  # not the model
    engine = DrafterEngine(settings(draft_folder, ask=ask))
    await engine.start()
    session_id = await engine.open(replace(OPENING, sources=None))
    draft = await engine.draft(session_id, Calibration(len(PROMPT), (2, 3), BUDGET))
    assert (draft.timings.calibrate_ns > 0) is (ask == "always")
    await engine.stop()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
async def test_the_base_model_as_its_own_draft_is_always_right(
    verifier: VerifierEngine,
    twin_drafter: DrafterEngine,
    sampling: SamplingParameters,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sampled too: both perturb with the same noise, so every choice is the drafter's first candidate."""
    assert twin_drafter._built is not None
    monkeypatch.setattr(twin_drafter._built._model, "_always_deepens", True)
    output = await drafted(verifier, twin_drafter, sampling, layer_parallel_size=1)
    verdicts = [round_.answer.verdict for round_ in output.rounds]
    assert [verdict.num_accepted for verdict in verdicts] == [0, 5, 5, 5, 5, 5]  # 1 + 5 x 6 tokens
    for round_ in output.rounds[1:]:
        chosen = round_.answer.verdict.token_ids[:5]
        first_candidates = []
        row = 0
        for token_id in chosen:
            first_candidates.append(next(iter(round_.draft.tree.children[row])))
            row = round_.draft.tree.children[row][token_id]
        assert tuple(first_candidates) == chosen


async def test_without_the_shared_noise_a_sampled_choice_would_be_missed(
    verifier: VerifierEngine, twin_drafter: DrafterEngine
) -> None:
    """The test above can fail: the same draft model with another seed is mostly wrong."""
    request = OpenVerification(PROMPT, SAMPLED, StopConditions(31, ignore_eos=True))
    other_noise = OpenVerification(PROMPT, SamplingParameters(seed=6, temperature=0.6), request.stop)
    async with drafting(twin_drafter, other_noise, LayerPlanRequest(1)) as drafts:
        output = await generate(verifier, request, drafts, TreeBudget(5, 1, 40))
    assert output.num_accepted < 20


@pytest.mark.parametrize("plan", [{"layer_parallel_size": 4}, {"layer_parallel_size": 4, "mlp": MlpPlacement.STAGED}])
async def test_fuzzy_plans_of_a_close_draft_still_earn(
    verifier: VerifierEngine, twin_drafter: DrafterEngine, plan: dict[str, Any]
) -> None:
    output = await drafted(verifier, twin_drafter, SAMPLED, **plan)
    assert output.num_accepted / (len(output.rounds) - 1) > 1.0


async def test_info_tells_model_and_plan(engine: DrafterEngine, draft_folder: Path) -> None:
    plans = candidate_plans(num_layers=6, mlp=MlpPlacement.STAGED)
    (plan,) = (each for each in plans if str(each) == engine.layer_groups)  # the fastest here and now
    size = max(len(group) for group in plan.groups)
    assert engine.layer_plan == LayerPlanRequest(size, plan.mlp, calibration=True)
    assert engine.max_tree_nodes == 64
    assert engine.model_info.name == draft_folder.name
    assert (engine.kv_usage().num_used_slots, engine.kv_usage().num_sessions) == (0, 0)


class Fault:
    """Breaks passes of every decoder while `is_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_on = False
        forward = Decoder.forward

        def faulty(decoder: Decoder, *arguments: Any) -> torch.Tensor:
            if self.is_on:
                raise RuntimeError("device lost")
            return forward(decoder, *arguments)

        monkeypatch.setattr(Decoder, "forward", faulty)


async def test_a_fault_fails_the_steps_sessions_leaks_nothing_and_the_engine_lives_on(
    engine: DrafterEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(monkeypatch)
    idle, hit = await engine.open(OPENING), await engine.open(OPENING)
    expected = (await engine.draft(idle, Calibration(6, (1,), BUDGET))).tree
    await engine.draft(hit, Calibration(6, (1,), BUDGET))
    fault.is_on = True
    with pytest.raises(RuntimeError, match="device lost"):
        await engine.draft(hit, Calibration(7, (2, 3), BUDGET))
    fault.is_on = False
    with pytest.raises(InvalidRequestError, match="an open session"):
        await engine.draft(hit, Calibration(9, (1,), BUDGET))
    assert (await engine.draft(idle, Calibration(7, (2,), BUDGET))).base_length == 8
    fresh = await engine.open(OPENING)
    assert (await engine.draft(fresh, Calibration(6, (1,), BUDGET))).tree == expected
    for session_id in (idle, hit, fresh):
        engine.close(session_id)
    await eventually(lambda: engine.kv_usage().num_sessions == 0)
    assert engine.kv_usage().num_used_slots == 0


async def test_a_fault_while_reading_a_prompt_ends_that_session(
    engine: DrafterEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its KV entries would be garbage; nobody waits for it yet, so it learns with its first calibration."""
    fault = Fault(monkeypatch)
    fault.is_on = True
    session_id = await engine.open(OPENING)
    await eventually(lambda: engine.kv_usage().num_sessions == 0)
    fault.is_on = False
    with pytest.raises(InvalidRequestError, match="an open session"):
        await engine.draft(session_id, Calibration(6, (1,), BUDGET))
    assert engine.kv_usage().num_used_slots == 0


async def test_a_fault_while_answering_leaves_nobody_waiting(
    engine: DrafterEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: object) -> None:
        raise RuntimeError("no idea")

    session_ids = [await engine.open(OPENING) for _ in range(3)]
    monkeypatch.setattr(ModelDrafting, "step", step)
    drafts = [asyncio.ensure_future(engine.draft(one, Calibration(6, (1,), BUDGET))) for one in session_ids]
    for draft in drafts:
        with pytest.raises(RuntimeError, match="no idea"):
            await asyncio.wait_for(draft, 5)
    await eventually(lambda: engine.kv_usage().num_sessions == 0)


async def test_closing_while_a_draft_is_under_way_frees_everything(engine: DrafterEngine) -> None:
    session_id = await engine.open(OPENING)
    waiting = asyncio.ensure_future(engine.draft(session_id, Calibration(6, (1,), BUDGET)))
    await asyncio.sleep(0)
    waiting.cancel()
    engine.close(session_id)
    engine.close(session_id)
    await eventually(lambda: engine.kv_usage().num_sessions == 0)
    assert engine.kv_usage().num_used_slots == 0


async def test_stopping_refuses_what_comes_later(draft_folder: Path) -> None:
    engine = DrafterEngine(settings(draft_folder))
    await engine.start()
    session_id = await engine.open(OPENING)
    await engine.stop()
    with pytest.raises(UnavailableError):
        await engine.draft(session_id, Calibration(6, (1,), BUDGET))
    with pytest.raises(UnavailableError):
        await engine.open(OPENING)


@pytest.mark.parametrize("changes", [{"max_tree_nodes": 1}, {"max_tree_nodes": 5}, {"max_model_len": 2}])
async def test_the_smallest_settings_start_and_draft(draft_folder: Path, changes: dict[str, int]) -> None:
    engine = DrafterEngine(settings(draft_folder, **changes))
    await engine.start()
    session_id = await engine.open(OpenSpeculation((1,), SAMPLED))
    assert len((await engine.draft(session_id, Calibration(1, (2,), TreeBudget(1, 1, 1)))).tree) == 1
    await engine.stop()


async def refusal(folder: Path, **changes: Any) -> str:
    engine = DrafterEngine(settings(folder, **changes))
    with pytest.raises(ConfigurationError) as error:
        await engine.start()
    await engine.stop()
    return str(error.value)


async def test_plans_and_checkpoints_that_do_not_fit_are_start_up_errors(draft_folder: Path, tmp_path: Path) -> None:
    assert "layer_groups is '0 | 1-3'" in await refusal(draft_folder, layer_groups="0 | 1-3")
    assert "layer_groups is '2-5'" in await refusal(draft_folder, layer_groups="0 | 2-5")
    assert "num_kv_slots is 64; allowed: at least" in await refusal(draft_folder, num_kv_slots=64)
    folder = Path(shutil.copytree(draft_folder, tmp_path / "copy"))
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    assert str(folder / "model.safetensors") in await refusal(folder)


async def test_groups_may_be_named_one_by_one(draft_folder: Path) -> None:
    engine = DrafterEngine(settings(draft_folder, layer_groups="0-1 | 2 | 3-5", mlp="sequential"))
    await engine.start()
    assert engine.layer_groups == "0-1 | 2 | 3-5"
    assert engine.layer_plan == LayerPlanRequest(3, MlpPlacement.SEQUENTIAL)
    await engine.stop()
