"""What a drafter learns about one base model does not count for another."""

from __future__ import annotations

from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate, Judge
from drafter_service.fusion.rounds import Rounds
from drafter_service.request import DraftRequest
from drafter_service.session import Session
from drafter_service.text.guessers import NO_RESOURCES, TextDrafting
from drafter_service.worth import RoundChoices
from easyspec.parallel.layer_groups import sequential_plan
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.speculation.sources import TEXT_SOURCES
from easyspec.speculation.token_tree import ScoredTree

PROMPT = (5, 6, 7, 8, 9) * 8
SAMPLING = SamplingParameters(seed=0, temperature=0.0)
REQUEST = DraftRequest(SAMPLING, sequential_plan(1), 1000, sources=TEXT_SOURCES)


def guess(session: Session) -> ScoredTree:
    """The tree of the next round, in which the last token is learned from."""
    rounds = Rounds()
    round_ = rounds.begin(session, 1, TreeBudget(8, 8, 8), num_sharing=1)
    rounds.finish(session)
    return round_.sent


def opened(estimate: AcceptanceEstimate) -> Session:
    """A new request, after a token that goes on as the prompt did."""
    tokens = [*PROMPT, PROMPT[0]]
    text = TextDrafting(NO_RESOURCES, TEXT_SOURCES, SAMPLING, tokens)
    return Session(1, REQUEST, tokens, Judge(estimate), RoundChoices(), text=text)


def disappoint(estimate: AcceptanceEstimate) -> None:
    """Requests whose every guess is wrong."""
    for _ in range(30):
        session = opened(estimate)
        for token_id in range(40, 61):
            guess(session)
            session.token_ids.append(token_id)


def test_disappointment_with_one_base_is_not_held_against_another() -> None:
    first, second = AcceptanceEstimate(), AcceptanceEstimate()
    fresh = guess(opened(second))
    assert len(fresh.tree) == 8
    disappoint(first)
    assert guess(opened(second)) == fresh
    assert guess(opened(first)) != fresh


def test_a_long_prompt_is_read_chunk_by_chunk() -> None:
    text = TextDrafting(NO_RESOURCES, TEXT_SOURCES, SAMPLING, [*range(50)] * 100)
    num_chunks = 0
    while not text.has_read_prompt:
        text.read()
        num_chunks += 1
    assert num_chunks == 3
