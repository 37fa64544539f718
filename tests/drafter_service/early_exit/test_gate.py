"""The gate learns from verdicts and from the clock what going on is worth."""

from __future__ import annotations

import random

import pytest

from drafter_service.early_exit.gate import ExitGate, LevelView, Stage
from drafter_service.model.exit_state import Look

FIRST = Stage(0, is_first=True, catches_up=False)
LATER = Stage(0, is_first=False, catches_up=False)
SURE, UNSURE = 0.99, 0.3
TOKEN_S = 0.01
BASE = ""


def gate_that_has_seen(gain_of: dict[float, float], stage_s: float, num_places: int = 400) -> ExitGate:
    """A gate after rounds in which going on helped as often as `gain_of` says, by confidence."""
    gate, generator = ExitGate(), random.Random(1)
    for stage in (FIRST, LATER):
        gate.observe_stage(stage, stage_s)
    for _ in range(num_places):
        gate.observe_round(BASE, 3 * TOKEN_S, num_tokens=3, num_right=2)
        for confidence, gain in gain_of.items():
            deeper = (7,) if generator.random() < gain else (9,)
            gate.observe_choice(BASE, [Look(confidence, (9,)), Look(confidence, deeper)], 7)
    return gate


def share_going_on(gate: ExitGate, stage: Stage, level: LevelView, times: int = 64) -> float:
    return sum(gate.goes_on(stage, [level])[0] for _ in range(times)) / times


def test_without_any_verdict_or_measurement_everybody_goes_on() -> None:
    assert ExitGate().goes_on(FIRST, [LevelView(SURE, 1.0, 1)]) == [True]


def test_who_is_unsure_goes_on_and_who_is_sure_leaves() -> None:
    """Going on helps one time in four where confidence is low, hardly ever where it is high."""
    gate = gate_that_has_seen({UNSURE: 0.25, SURE: 0.01}, stage_s=0.05 * TOKEN_S)
    assert share_going_on(gate, FIRST, LevelView(UNSURE, 1.0, 1)) == 1.0
    assert share_going_on(gate, FIRST, LevelView(SURE, 1.0, 3)) < 0.1


@pytest.mark.parametrize(("stage_s", "goes_on"), [(0.02 * TOKEN_S, True), (5.0 * TOKEN_S, False)])
def test_a_dear_stage_must_help_more(stage_s: float, goes_on: bool) -> None:
    gate = gate_that_has_seen({UNSURE: 0.25}, stage_s)
    assert (share_going_on(gate, LATER, LevelView(UNSURE, 1.0, 2)) > 0.5) is goes_on


def test_a_level_that_the_verdict_hardly_reaches_leaves() -> None:
    gate = gate_that_has_seen({UNSURE: 0.25}, stage_s=0.1 * TOKEN_S)
    assert share_going_on(gate, LATER, LevelView(UNSURE, 1.0, 2)) == 1.0
    assert share_going_on(gate, LATER, LevelView(UNSURE, 0.05, 2)) < 0.1


def test_what_follows_a_level_makes_it_worth_more() -> None:
    """Two tokens are accepted a round: one follows the first, none the second."""
    gate = gate_that_has_seen({UNSURE: 0.25}, stage_s=0.35 * TOKEN_S)
    assert share_going_on(gate, LATER, LevelView(UNSURE, 1.0, 1)) == 1.0
    assert share_going_on(gate, LATER, LevelView(UNSURE, 1.0, 2)) < 0.1


def test_everybody_waits_for_one_who_goes_on_alone() -> None:
    gate = gate_that_has_seen({UNSURE: 0.25, SURE: 0.0}, stage_s=0.1 * TOKEN_S)
    unsure, sure = LevelView(UNSURE, 1.0, 2), LevelView(SURE, 1.0, 2)
    assert gate.goes_on(LATER, [unsure, sure]) == [True, False]
    assert gate.goes_on(LATER, [unsure, *[sure] * 8]) == [False] * 9


def test_now_and_then_a_level_goes_on_so_that_the_gate_hears_of_it() -> None:
    gate = gate_that_has_seen({SURE: 0.0}, stage_s=TOKEN_S)
    assert share_going_on(gate, LATER, LevelView(SURE, 1.0, 2)) == 1 / 16


def test_it_changes_its_mind_and_an_outlier_does_not_change_it() -> None:
    gate = gate_that_has_seen({UNSURE: 0.25}, stage_s=0.05 * TOKEN_S)
    gate.observe_round(BASE, 3600.0, num_tokens=1, num_right=0)  # a client that paused for an hour
    assert share_going_on(gate, LATER, LevelView(UNSURE, 0.02, 2)) < 0.1
    for _ in range(2000):
        gate.observe_choice(BASE, [Look(UNSURE, (7,)), Look(UNSURE, (7,))], 7)
    assert share_going_on(gate, LATER, LevelView(UNSURE, 1.0, 2)) < 0.1


def test_what_one_base_model_taught_is_not_held_against_another() -> None:
    gate = gate_that_has_seen({UNSURE: 0.0}, stage_s=0.05 * TOKEN_S)
    gate.observe_round("other", TOKEN_S, num_tokens=1, num_right=0)
    for _ in range(100):
        gate.observe_choice("other", [Look(UNSURE, (9,)), Look(UNSURE, (7,))], 7)
    assert share_going_on(gate, LATER, LevelView(UNSURE, 1.0, 2)) < 0.1
    assert share_going_on(gate, LATER, LevelView(UNSURE, 1.0, 2, "other")) == 1.0


def test_base_models_beyond_a_bound_are_forgotten() -> None:
    gate = gate_that_has_seen({UNSURE: 0.0}, stage_s=0.05 * TOKEN_S)
    for number in range(100):
        gate.observe_round(f"made up {number}", TOKEN_S, num_tokens=1, num_right=0)
    assert share_going_on(gate, LATER, LevelView(UNSURE, 1.0, 2)) == 1.0  # as if nothing were known
