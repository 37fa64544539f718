"""All levels from one pass: mask tokens say what a plain pass over them would say, and leave nothing behind."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from easyspec.errors import ConfigurationError
from easyspec.speculation.parameters import TreeBudget
from tests.drafter_service.core_driver import BUDGET, GREEDY, SAMPLED, CoreDriver, build_core
from tests.fakes.checkpoints import VOCAB_SIZE, change_config

MASK = VOCAB_SIZE - 1
PROMPT = tuple(random.Random(5).randrange(VOCAB_SIZE - 1) for _ in range(30))


@pytest.fixture(scope="module")
def pard_folder(draft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(draft_folder, tmp_path_factory.mktemp("pard"), dirs_exist_ok=True))
    change_config(folder, pard_token=MASK)
    return folder


@pytest.fixture(scope="module")
def pard_core(pard_folder: Path) -> CoreDriver:
    return build_core(pard_folder, share_prefixes=False, num_guesses=2)


@pytest.fixture
def pard(pard_core: CoreDriver) -> Iterator[CoreDriver]:
    yield pard_core
    assert pard_core.memory.num_used_slots == 0


def test_all_levels_come_from_the_calibration(pard: CoreDriver) -> None:
    sessions = [pard.open(PROMPT[:length], sampling) for length, sampling in ((30, GREEDY), (20, SAMPLED))]
    lengths = [30, 20]
    for _ in range(3):
        tasks = [pard.ask(one, length, (9, 8), BUDGET) for one, length in zip(sessions, lengths, strict=True)]
        for draft in pard.finish(tasks):
            assert draft.tree.num_levels == BUDGET.num_levels
            assert draft.timings.num_fuzzy_steps == 0
            assert MASK not in draft.tree.token_ids
        lengths = [length + 2 for length in lengths]
    tokens = [*PROMPT, *((9, 8) * 3)]
    fresh_id = pard.open(tokens[:-1])
    pard.draft(fresh_id, len(tokens) - 1, tokens[-1:], TreeBudget(1, 1, 1))
    difference = (pard.kv(sessions[0], len(tokens)) - pard.kv(fresh_id, len(tokens))).abs().max().item()
    assert difference < 1e-5, "mask tokens leave no trace"
    for session_id in (*sessions, fresh_id):
        pard.close(session_id)


def test_a_mask_token_says_what_a_pass_over_it_says(pard: CoreDriver, core: CoreDriver) -> None:
    session_id, plain_id = pard.open(PROMPT, GREEDY), core.open(PROMPT, GREEDY)
    tree = pard.draft(session_id, len(PROMPT), (9,), TreeBudget(3, 1, 24))
    for level, text in ((1, (9,)), (2, (MASK,)), (3, (MASK,))):
        plain = core.draft(plain_id, len(PROMPT) + level - 1, text, TreeBudget(1, 1, 8))
        best = next(token for token in plain.token_ids if token != MASK)
        assert best in {tree.token_ids[row - 1] for row in range(1, len(tree) + 1) if tree.row_depths[row] == level}
    pard.close(session_id)
    core.close(plain_id)


def test_a_mask_token_beyond_the_vocabulary_is_refused(pard_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pard_folder, tmp_path / "bad"))
    change_config(folder, pard_token=VOCAB_SIZE)
    with pytest.raises(ConfigurationError, match="pard_token is"):
        build_core(folder)
