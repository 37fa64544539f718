"""Calibration repairs the KV cache; fuzzy entries never outlive their round."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from easyspec.speculation.parameters import LayerPlanRequest, TreeBudget
from tests.drafter_service.core_driver import (
    BUDGET,
    GREEDY,
    PAPER,
    SAMPLED,
    SEQUENTIAL,
    STAGED,
    CoreDriver,
    build_core,
    deepest_path,
)
from tests.fakes.checkpoints import VOCAB_SIZE

PROMPT = tuple(random.Random(1).randrange(VOCAB_SIZE) for _ in range(121))
ONE_LEVEL = TreeBudget(1, 1, 1)
PLANS = {"one": SEQUENTIAL, "paper": PAPER, "staged": STAGED, "all": LayerPlanRequest(6)}


def after_rounds(core: CoreDriver, plan: LayerPlanRequest, num_rounds: int = 5) -> tuple[int, list[int]]:
    """A session after rounds that accepted a deepest path each, and its tokens."""
    session_id = core.open(PROMPT, SAMPLED, plan)
    tokens = list(PROMPT)
    said: Sequence[int] = (9,)
    for round_ in range(num_rounds):
        tree = core.draft(session_id, len(tokens), said)
        tokens += said
        path = deepest_path(tree)
        said = (*path[: len(path) - round_ % 2], 7)
        assert len(said) > 2
    core.draft(session_id, len(tokens), said, ONE_LEVEL)
    return session_id, tokens + list(said)


def fresh(core: CoreDriver, tokens: list[int]) -> int:
    session_id = core.open(tokens[:-1])
    core.draft(session_id, len(tokens) - 1, tokens[-1:], ONE_LEVEL)
    return session_id


def difference(core: CoreDriver, plan: LayerPlanRequest) -> float:
    """Largest difference of K and V between a session after rounds and a fresh prefill of its tokens."""
    session_id, tokens = after_rounds(core, plan)
    fresh_id = fresh(core, tokens)
    difference = (core.kv(session_id, len(tokens)) - core.kv(fresh_id, len(tokens))).abs().max().item()
    core.close(session_id)
    core.close(fresh_id)
    return difference


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_kv_after_calibration_is_that_of_a_fresh_prefill(core: CoreDriver, plan: LayerPlanRequest) -> None:
    assert difference(core, plan) < 1e-5


@pytest.mark.parametrize("plan", [PAPER, STAGED], ids=["paper", "staged"])
def test_without_calibration_fuzzy_kv_stays(core: CoreDriver, plan: LayerPlanRequest) -> None:
    """The ablation; and the proof that the test above can fail."""
    assert difference(core, replace(plan, calibration=False)) > 1e-2


def test_with_single_layers_there_is_nothing_to_repair(core: CoreDriver) -> None:
    assert difference(core, replace(SEQUENTIAL, calibration=False)) < 1e-5


@pytest.mark.parametrize("plan", [SEQUENTIAL, STAGED, replace(STAGED, calibration=False)])
def test_slots_are_those_of_the_text_and_of_the_last_trees_expanded_nodes(
    core: CoreDriver, plan: LayerPlanRequest
) -> None:
    assert core.memory.num_used_slots == 0
    session_id, tokens = after_rounds(core, plan)
    assert core.memory.num_used_slots == len(tokens)  # a tree of one level expands nothing
    core.draft(session_id, len(tokens), (3,))
    assert core.memory.num_used_slots == len(tokens) + 1 + (BUDGET.num_levels - 1) * BUDGET.width
    core.close(session_id)
    assert core.memory.num_used_slots == 0


def test_the_first_level_is_exact_and_the_next_is_fuzzy(core: CoreDriver) -> None:
    """Whatever the plan, the root's candidates are those of sequential execution; below, plans differ."""
    trees = {}
    for name, plan in PLANS.items():
        session_id = core.open(PROMPT, GREEDY, plan)
        trees[name] = core.draft(session_id, len(PROMPT), (9,), TreeBudget(5, 4, 64))
        core.close(session_id)
    levels = {
        name: [
            tuple(t for t, depth in zip(tree.token_ids, tree.row_depths[1:], strict=True) if depth == level)
            for level in (1, 2)
        ]
        for name, tree in trees.items()
    }
    assert len({tuple(first) for first, _ in levels.values()}) == 1
    assert levels["one"][1] != levels["all"][1]


def test_a_prompt_read_in_chunks_gives_the_same_kv_and_trees(draft_folder: Path, core: CoreDriver) -> None:
    chunked = build_core(draft_folder, prefill_chunk=16)
    expected_id, session_id = core.open(PROMPT), chunked.open(PROMPT)
    assert core.draft(expected_id, len(PROMPT), (9,)) == chunked.draft(session_id, len(PROMPT), (9,))
    num_tokens = len(PROMPT) + 1
    torch.testing.assert_close(
        chunked.kv(session_id, num_tokens), core.kv(expected_id, num_tokens), rtol=0.0, atol=1e-5
    )
    core.close(expected_id)
