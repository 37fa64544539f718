"""The cost model: against the paper, and in the directions that must hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyspec.errors import InvalidRequestError
from easyspec.parallel.layer_groups import paper_plan
from easyspec.planner.acceptance import acceptance_rate
from easyspec.planner.costs import CostModel, Load
from easyspec.planner.hardware import DEVICES, STACKS, device_named, service_stacks
from easyspec.planner.planner import Workload, make_plan
from easyspec.planner.scheme import draft_schemes
from easyspec.planner.shape import KNOWN_SHAPES, find_shape
from easyspec.planner.validation import compare_with_paper
from easyspec.speculation.parameters import MlpPlacement

BASE, DRAFT = KNOWN_SHAPES["llama-3-70b"], KNOWN_SHAPES["llama-3-8b"]
LOAD = Load(4, 2048)


def costs(device: str = "h100", stack: str = "graphs") -> CostModel:
    return CostModel(device_named(device), STACKS[stack])


@pytest.mark.parametrize("comparison", list(compare_with_paper()), ids=lambda c: f"{c.data}-{c.figure}")
def test_the_paper_is_met_within_15_percent(comparison: Any) -> None:
    assert abs(comparison.error) < 0.15


def test_sizes_of_llama_3_8b_are_the_published_ones() -> None:
    assert DRAFT.weight_bytes / 2 == pytest.approx(8.03e9, rel=0.001)
    assert BASE.weight_bytes / 2 == pytest.approx(70.55e9, rel=0.001)
    share = DRAFT.attention_parameters / (DRAFT.attention_parameters + DRAFT.mlp_parameters)
    assert share == pytest.approx(0.19, abs=0.005)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stack", STACKS)
def test_no_pass_beats_the_memory_bandwidth(device: str, stack: str) -> None:
    model = costs(device, stack)
    least_us = 1e6 * (DRAFT.weight_bytes - 2 * DRAFT.head_parameters) / model.device.memory_bytes_per_s
    assert model.tensor_parallel_us(DRAFT, LOAD, 1) > least_us
    for scheme in draft_schemes(DRAFT, 8):
        if not scheme.is_tensor_parallel:
            fuzzy_us = model.layer_parallel_us(DRAFT, LOAD, scheme.plan, scheme.num_ranks)
            assert fuzzy_us > least_us / scheme.num_ranks


def test_a_plan_of_single_layers_on_one_rank_is_an_ordinary_pass() -> None:
    plan = paper_plan(DRAFT.num_layers, 1, MlpPlacement.SEQUENTIAL)
    assert costs().layer_parallel_us(DRAFT, LOAD, plan, 1) == pytest.approx(costs().tensor_parallel_us(DRAFT, LOAD, 1))


@given(rows=st.integers(1, 64), more=st.integers(1, 64), context=st.integers(1, 30_000))
def test_more_rows_and_more_context_never_cost_less(rows: int, more: int, context: int) -> None:
    model = costs()
    for ranks in (1, 8):
        small = model.tensor_parallel_us(BASE, Load(rows, context), ranks)
        assert model.tensor_parallel_us(BASE, Load(rows + more, context), ranks) >= small
        assert model.tensor_parallel_us(BASE, Load(rows, context + more), ranks) >= small


def test_attention_only_parallelism_is_capped_by_the_share_of_attention() -> None:
    """In an engine bound by bandwidth alone, attention-only groups cannot gain more than attention's bytes."""
    stack = replace(STACKS["graphs"], kernel_floor_us=0.0, collective_us=0.0)
    model = CostModel(device_named("h100"), stack)
    plan = paper_plan(DRAFT.num_layers, 4, MlpPlacement.SEQUENTIAL)
    no_context = Load(1, 1)
    gain = model.tensor_parallel_us(DRAFT, no_context, 1) / model.layer_parallel_us(DRAFT, no_context, plan, 4)
    assert 1.05 < gain < 1.16


def test_only_even_splits_are_offered() -> None:
    assert BASE.supported_ranks(8) == [1, 2, 4, 8]
    assert KNOWN_SHAPES["qwen2-1.5b"].supported_ranks(8) == [1, 2, 4]  # 12 heads and 2 KV heads: not 3


def test_a_base_that_fits_nowhere_is_refused_with_the_sizes() -> None:
    with pytest.raises(InvalidRequestError, match="GiB"):
        make_plan(costs("a100-40gb"), BASE, DRAFT, 2, Workload())


def test_the_recommended_scheme_is_the_fastest_and_plain_decoding_wins_over_useless_drafts() -> None:
    plan = make_plan(costs(), BASE, DRAFT, 8, Workload())
    assert plan.recommended is not None
    assert plan.recommended.tokens_per_s == max(estimate.tokens_per_s for estimate in plan.estimates)
    assert make_plan(costs(), BASE, DRAFT, 8, Workload(exact_acceptance_rate=0.0)).recommended is None
    assert make_plan(costs(), DRAFT, BASE, 8, Workload()).recommended is None


def test_drafting_ahead_is_worth_what_it_guesses() -> None:
    rounds = {
        rate: make_plan(costs(), BASE, DRAFT, 8, Workload(ahead_hit_rate=rate)).estimates for rate in (0.0, 0.5, 1.0)
    }
    for never, sometimes, always in zip(*rounds.values(), strict=True):
        assert never.ahead_round_ms == never.round_ms
        assert always.ahead_round_ms <= sometimes.ahead_round_ms <= never.ahead_round_ms
        assert always.ahead_round_ms >= always.verify_ms


def test_fuzzier_plans_are_accepted_less() -> None:
    rates = [
        acceptance_rate(0.9, paper_plan(24, size, mlp))
        for mlp in (MlpPlacement.SEQUENTIAL, MlpPlacement.STAGED)
        for size in (1, 2, 3, 4, 5, 6, 9)
    ]
    assert rates[:7] == sorted(rates[:7], reverse=True)
    assert rates[7:] == sorted(rates[7:], reverse=True)
    assert all(staged <= sequential for sequential, staged in zip(rates[:7], rates[7:], strict=True))


def test_a_checkpoint_folder_has_the_shape_of_its_config() -> None:
    shape = find_shape("models/base")
    assert (shape.num_layers, shape.vocab_size) == (24, 4096)


@pytest.mark.parametrize(("table", "name"), [("gpu", device_named), ("stack", service_stacks)])
def test_an_unknown_name_is_refused_with_those_known(table: str, name: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{table} is 'abacus'"):
        name("abacus")
