"""What a drafter learns about one base model does not count for another, and is bounded."""

from __future__ import annotations

from drafter_service.fusion.estimates_by_target import EstimatesByTarget
from drafter_service.fusion.fused_drafting import FusedDrafting
from drafter_service.text.guessers import TextResources
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sources import TEXT_SOURCES
from easyspec.speculation.token_tree import ScoredTree

PROMPT = (5, 6, 7, 8, 9) * 8
GREEDY = SamplingParameters(seed=0, temperature=0.0)


def guess(fused: FusedDrafting, session_id: int, target: str) -> ScoredTree:
    """What a new request to `target` is answered with, after a token that goes on as the prompt did."""
    fused.open(session_id, PROMPT, GREEDY, TEXT_SOURCES, target)
    while not fused.read(session_id):
        pass
    fused.begin(session_id, PROMPT[:1])
    return fused.finish(session_id, None, num_nodes=8).scored


def disappoint(fused: FusedDrafting, target: str) -> None:
    """Requests whose every guess is wrong."""
    for session_id in range(100, 130):
        guess(fused, session_id, target)
        for token_id in range(40, 60):
            fused.begin(session_id, (token_id,))
            fused.finish(session_id, None, num_nodes=8)
        fused.close(session_id)


def test_disappointment_with_one_base_is_not_held_against_another() -> None:
    fresh = guess(FusedDrafting(TextResources()), 1, "any")
    assert len(fresh.tree) == 8
    fused = FusedDrafting(TextResources())
    disappoint(fused, "first")
    assert guess(fused, 1, "second") == fresh
    assert guess(fused, 2, "first") != fresh


def test_the_target_unused_for_longest_is_forgotten() -> None:
    estimates = EstimatesByTarget(max_targets=2)
    first, second = estimates.of("first"), estimates.of("second")
    assert estimates.of("first") is first
    estimates.of("third")
    assert estimates.of("first") is first
    assert estimates.of("second") is not second
