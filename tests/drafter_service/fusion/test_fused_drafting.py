"""What a drafter learns about one base model does not count for another."""

from __future__ import annotations

from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate
from drafter_service.fusion.fused_drafting import FusedDrafting
from drafter_service.request import DraftRequest
from drafter_service.text.guessers import NO_RESOURCES
from easyspec.parallel.layer_groups import sequential_plan
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sources import TEXT_SOURCES
from easyspec.speculation.token_tree import ScoredTree

PROMPT = (5, 6, 7, 8, 9) * 8
REQUEST = DraftRequest(SamplingParameters(seed=0, temperature=0.0), sequential_plan(1), 1000, sources=TEXT_SOURCES)


def guess(fused: FusedDrafting) -> ScoredTree:
    fused.begin()
    fused.last = fused.fuse(None, num_nodes=8)
    return fused.last.scored


def opened(estimate: AcceptanceEstimate) -> tuple[FusedDrafting, list[int]]:
    """A new request, after a token that goes on as the prompt did, and its tokens."""
    tokens = [*PROMPT, PROMPT[0]]
    return FusedDrafting(NO_RESOURCES, REQUEST, tokens, estimate), tokens


def disappoint(estimate: AcceptanceEstimate) -> None:
    """Requests whose every guess is wrong."""
    for _ in range(30):
        fused, tokens = opened(estimate)
        for token_id in range(40, 60):
            guess(fused)
            tokens.append(token_id)
            fused.learn((token_id,))


def test_disappointment_with_one_base_is_not_held_against_another() -> None:
    first, second = AcceptanceEstimate(), AcceptanceEstimate()
    fresh = guess(opened(second)[0])
    assert len(fresh.tree) == 8
    disappoint(first)
    assert guess(opened(second)[0]) == fresh
    assert guess(opened(first)[0]) != fresh


def test_a_long_prompt_is_read_chunk_by_chunk() -> None:
    fused = FusedDrafting(NO_RESOURCES, REQUEST, [*range(50)] * 100, AcceptanceEstimate())
    num_chunks = 0
    while not fused.has_read_prompt:
        fused.read()
        num_chunks += 1
    assert num_chunks == 3
