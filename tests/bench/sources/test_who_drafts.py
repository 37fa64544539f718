"""Hand-made recordings on a made-up clock, whose rounds can be counted by head."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from bench.sources.recording import Recorded
from bench.sources.who_drafts import Durations, run
from drafter_service.text.guessers import TextResources
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources
from easyspec.speculation.token_tree import EMPTY_TREE, ScoredTree, TokenTree

MODEL, ALL_SOURCES = DraftSources.MODEL, DraftSources.MODEL | TEXT_SOURCES
NOWHERE = 999
DURATIONS = Durations(rest=22.0, model=14.0, lookup=0.5, retrieval=0.05, ngram=0.1)


def chain(token_ids: Sequence[int]) -> ScoredTree:
    parents = tuple(range(len(token_ids)))
    return ScoredTree(TokenTree(tuple(token_ids), parents), tuple(-0.1 * (row + 1) for row in parents))


def recorded(name: str, prompt: Sequence[int], output: Sequence[int], num_right: int) -> Recorded:
    """A completion whose draft model guesses five tokens of which the first `num_right` are right."""
    trees = []
    for position in range(1, len(output)):
        right = output[position : position + num_right]
        trees.append(chain([*right, *[NOWHERE] * (5 - len(right))]))
    return Recorded(name, tuple(prompt), SamplingParameters(seed=3, temperature=0.0), [*output], trees)


@pytest.fixture
def novel() -> Recorded:
    """Text without a repetition, whose draft model is right about three tokens."""
    numbers = random.Random(1).sample(range(900), 61)
    return recorded("prose", numbers[:20], numbers[20:], num_right=3)


@pytest.fixture
def copied() -> Recorded:
    """A copy of the prompt, whose draft model is always wrong."""
    numbers = random.Random(2).sample(range(900), 64)
    return recorded("copy", numbers, numbers, num_right=0)


def test_time_passes_as_it_is_said_to(novel: Recorded) -> None:
    outcome = run([novel], TextResources(), MODEL, 16, DURATIONS)["prose", 0.0]
    assert outcome.num_tokens == 40
    assert outcome.num_rounds == outcome.num_model_rounds == 10
    assert outcome.milliseconds == pytest.approx(10 * (14 + 22))
    assert str(outcome) == "111 (4.00; 100%)"


def test_two_runs_on_the_made_up_clock_are_the_same(novel: Recorded, copied: Recorded) -> None:
    both = [novel, copied] * 4
    assert run(both, TextResources(), ALL_SOURCES, 16, DURATIONS) == run(
        both, TextResources(), ALL_SOURCES, 16, DURATIONS
    )


def test_the_model_is_asked_where_it_pays_or_always(copied: Recorded) -> None:
    copies = [copied] * 8
    [where_it_pays] = run(copies, TextResources(), ALL_SOURCES, 16, DURATIONS).values()
    [always] = run(copies, TextResources(), ALL_SOURCES, 16, DURATIONS, asks_all_sources=True).values()
    assert always.num_model_rounds == always.num_rounds
    assert where_it_pays.num_model_rounds < where_it_pays.num_rounds / 2
    assert where_it_pays.num_tokens == always.num_tokens
    assert where_it_pays.milliseconds < always.milliseconds


def test_a_drafter_that_guesses_nothing_gets_a_token_a_round(copied: Recorded) -> None:
    copied.model_trees = [ScoredTree(EMPTY_TREE, ())] * len(copied.model_trees)
    [outcome] = run([copied], TextResources(), MODEL, 16, DURATIONS).values()
    assert outcome.num_tokens == outcome.num_rounds == 63
