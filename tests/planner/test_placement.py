"""Ranks and layer plans for the GPUs that are there."""

from __future__ import annotations

import pytest

from easyspec.errors import InvalidRequestError
from easyspec.planner.costs import CostModel
from easyspec.planner.gpus import Gpu, known_device
from easyspec.planner.hardware import service_stacks
from easyspec.planner.memory import kv_tokens_that_fit, missing_bytes
from easyspec.planner.placement import Wishes, place
from easyspec.planner.planner import Workload, make_plan
from easyspec.planner.scheme import draft_schemes
from easyspec.planner.shape import KNOWN_SHAPES

BASE, DRAFT = KNOWN_SHAPES["llama-3-70b"], KNOWN_SHAPES["llama-3-8b"]
SMALL_BASE, SMALL_DRAFT = KNOWN_SHAPES["llama-3-8b"], KNOWN_SHAPES["llama-3.2-1b"]
GIB = 2**30
H200 = Gpu("NVIDIA H200", 140 * GIB)
UNKNOWN = Gpu("Abacus 9000", 80 * GIB)
NO_WISHES = Wishes()


def test_the_recommended_plan_is_taken_and_explained() -> None:
    device = known_device([H200])
    assert device is not None
    plan = make_plan(CostModel(device, *service_stacks("service")), BASE, DRAFT, 8, Workload())
    assert plan.recommended is not None
    scheme = plan.recommended.scheme
    placement = place(BASE, DRAFT, [H200] * 8, NO_WISHES)
    assert (placement.verifier_ranks, placement.drafter_ranks) == (plan.verifier_ranks, scheme.num_ranks)
    assert placement.layer_flags["--layer-parallel-size"] == str(scheme.layer_parallel_size)
    assert placement.layer_flags.get("--rank-placement") == (scheme.placement if scheme.num_ranks > 1 else None)
    for word in ("8 x h200", "a round of", "x plain decoding"):
        assert word in str(placement)
    assert "\n" not in str(placement)


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(tensor_parallel_size=4),
        Wishes(drafter_ranks=2),
        Wishes(drafter_ranks=1),
        Wishes(layer_parallel_size=6, mlp="staged"),
        Wishes(mlp="sequential", layer_parallel_size=4, drafter_ranks=4),
        Wishes(rank_placement="tensor", drafter_ranks=4),
        Wishes(2, 2, 2, "staged", "layers"),
        Wishes(drafter_ranks=5),  # nothing that the planner compares
        Wishes(layer_parallel_size=7),
    ],
    ids=str,
)
def test_what_was_asked_for_is_kept(wishes: Wishes) -> None:
    placement = place(BASE, DRAFT, [H200] * 8, wishes)
    flags = placement.layer_flags
    assert wishes.tensor_parallel_size in (None, placement.verifier_ranks)
    assert wishes.drafter_ranks in (None, placement.drafter_ranks)
    if wishes.layer_parallel_size is not None:
        assert flags["--layer-parallel-size"] == str(wishes.layer_parallel_size)
    if wishes.mlp is not None:
        assert flags["--mlp"] == wishes.mlp
    if wishes.rank_placement is not None:
        assert flags["--rank-placement"] == wishes.rank_placement
    assert placement.num_kv_slots is not None


def test_on_one_gpu_there_is_one_rank_and_a_pool_for_both_models() -> None:
    placement = place(SMALL_BASE, SMALL_DRAFT, [Gpu("NVIDIA L4", 24 * GIB)], NO_WISHES)
    assert (placement.verifier_ranks, placement.drafter_ranks) == (1, 1)
    assert "--rank-placement" not in placement.layer_flags
    assert placement.num_kv_slots is not None
    assert placement.num_kv_slots >= 4096


def test_the_pools_fill_the_memory_and_no_more() -> None:
    for scheme in draft_schemes(DRAFT, 4):
        slots = kv_tokens_that_fit(80 * GIB, BASE, DRAFT, 4, scheme)
        assert missing_bytes(80 * GIB, BASE, DRAFT, 4, scheme, slots) <= 0
        assert missing_bytes(80 * GIB, BASE, DRAFT, 4, scheme, slots + 1) > 0


def test_an_unknown_gpu_gets_the_fewest_ranks_and_says_so() -> None:
    placement = place(BASE, DRAFT, [UNKNOWN] * 8, NO_WISHES)
    assert (placement.verifier_ranks, placement.drafter_ranks) == (4, 1)  # 141 GB on 2 leave no room for the draft
    assert placement.layer_flags == {"--layer-parallel-size": "1"}
    assert "no speed of Abacus 9000 is known" in str(placement)
    asked = place(BASE, DRAFT, [UNKNOWN] * 8, Wishes(tensor_parallel_size=8, drafter_ranks=2, layer_parallel_size=4))
    assert (asked.verifier_ranks, asked.drafter_ranks) == (8, 2)
    assert asked.layer_flags == {"--layer-parallel-size": "4"}
    assert "--drafter-ranks 2" in str(asked)


@pytest.mark.parametrize("gpu", [Gpu("NVIDIA A100-SXM4-40GB", 40 * GIB), Gpu("Abacus", 40 * GIB)])
def test_a_draft_that_does_not_fit_is_left_out_and_a_base_is_refused(gpu: Gpu) -> None:
    placement = place(BASE, DRAFT, [gpu] * 4, NO_WISHES)
    assert not placement.has_drafter
    assert "no drafter" in str(placement)
    assert "fit" in str(placement)
    with pytest.raises(InvalidRequestError, match="the base needs"):
        place(BASE, DRAFT, [gpu] * 2, NO_WISHES)
    with pytest.raises(InvalidRequestError, match="the base needs"):
        place(BASE, None, [gpu] * 2, NO_WISHES)


@pytest.mark.parametrize("gpu", [H200, UNKNOWN])
def test_without_a_draft_there_is_the_verifier_alone(gpu: Gpu) -> None:
    placement = place(BASE, None, [gpu] * 8, NO_WISHES)
    assert not placement.has_drafter
    assert placement.verifier_ranks == (8 if gpu is H200 else 2)


def test_useless_drafts_are_started_and_called_so() -> None:
    """The gateway's `auto` turns them off; a draft that is named is used."""
    placement = place(SMALL_DRAFT, SMALL_BASE, [H200], NO_WISHES)
    assert placement.has_drafter
    assert "none beats plain decoding" in str(placement)
