"""Counting how much of a base's answers is guessed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.probes.acceptance import Acceptance, draft_answers
from bench.sources.recording import Recorded, record_outputs
from easyspec.speculation.parameters import SamplingParameters, StopConditions, TreeBudget
from tests.fakes.checkpoints import write_checkpoint

# Enough nodes that none is pruned.
BUDGET = TreeBudget(num_levels=3, width=2, num_nodes=40)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), has_tokenizer=True)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_base_guesses_its_own_answers(base: Path, temperature: float) -> None:
    answer = Recorded("chat", (5, 6, 7), SamplingParameters(3, temperature))
    asyncio.run(record_outputs([answer], base, StopConditions(21)))
    assert len(answer.output) == 21
    found = draft_answers([answer], base, BUDGET)["chat", temperature]
    assert found.num_accepted == found.num_reached == [5, 5, 5]
    assert (found.num_rounds, found.num_tokens) == (5, 20)


def test_another_model_guesses_less(base: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path, has_tokenizer=True, seed=1)
    answer = Recorded("chat", (5, 6, 7), SamplingParameters(3, 0.0))
    asyncio.run(record_outputs([answer], base, StopConditions(21)))
    found = draft_answers([answer], other, BUDGET)["chat", 0.0]
    assert found.num_tokens == 20
    assert found.num_rounds > 10


def test_rounds_near_the_end_count_for_the_levels_that_they_have() -> None:
    acceptance = Acceptance(3)
    acceptance.add(num_accepted=2, num_left=10)
    acceptance.add(num_accepted=2, num_left=2)
    acceptance.add(num_accepted=0, num_left=1)
    assert acceptance.num_reached == [3, 2, 1]
    assert acceptance.num_accepted == [2, 2, 0]
    assert acceptance.num_tokens == 3 + 2 + 1
    row = acceptance.row("chat", 0.0)
    assert (row["level 1"], row["level 3"], row["length"]) == ("0.67", "0.00", "2.00")
