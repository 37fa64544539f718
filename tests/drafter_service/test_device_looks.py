"""A round of drafting looks at the device once a level: when it reads the level that it grows the tree by."""

from __future__ import annotations

from pathlib import Path

import pytest

from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from tests.drafter_service.core_driver import GREEDY, PAPER, SAMPLED, STAGED, CoreDriver, build_core
from tests.fakes.device_looks import counted_looks, pretend_remote

PROMPT = (5, 8, 13, 21, 34, 55)
NUM_LEVELS = 4
BUDGET = TreeBudget(NUM_LEVELS, 3, 12)


@pytest.fixture
def core(draft_folder: Path, monkeypatch: pytest.MonkeyPatch) -> CoreDriver:
    pretend_remote(monkeypatch)
    return build_core(draft_folder, executor="reference")


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
def test_one_look_a_level(core: CoreDriver, sampling: SamplingParameters) -> None:
    session_id = core.open(PROMPT, sampling, STAGED)
    core.draft(session_id, len(PROMPT), (3,), BUDGET)
    with counted_looks() as looks:
        core.draft(session_id, len(PROMPT) + 1, (4, 5), BUDGET)
    assert looks == {"tolist": NUM_LEVELS}


def test_sessions_share_the_looks(core: CoreDriver) -> None:
    sessions = [core.open(PROMPT, sampling, STAGED) for sampling in (GREEDY, SAMPLED, SAMPLED)]
    core.finish([core.ask(session_id, len(PROMPT), (3,), BUDGET) for session_id in sessions])
    with counted_looks() as looks:
        core.finish([core.ask(session_id, len(PROMPT) + 1, (4,), BUDGET) for session_id in sessions])
    assert looks == {"tolist": NUM_LEVELS}


def test_another_plan_has_looks_of_its_own(core: CoreDriver) -> None:
    sessions = [core.open(PROMPT, GREEDY, plan) for plan in (PAPER, STAGED)]
    core.finish([core.ask(session_id, len(PROMPT), (3,), BUDGET) for session_id in sessions])
    with counted_looks() as looks:
        core.finish([core.ask(session_id, len(PROMPT) + 1, (4,), BUDGET) for session_id in sessions])
    assert looks == {"tolist": 2 * NUM_LEVELS - 1}, "the first level comes from one exact pass"


def test_reading_a_prompt_takes_none(core: CoreDriver) -> None:
    core.open(PROMPT * 20, GREEDY, STAGED)
    with counted_looks() as looks:
        while core.drafter.step():
            pass
    assert looks == {}
