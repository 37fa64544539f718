"""One tree from many guessers: a tree, the best one by its own measure, and the measure learns."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.fusion import union
from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate, Judge
from drafter_service.fusion.rounds import ModelGuesser
from drafter_service.fusion.union import FusedTree, fuse, learn
from drafter_service.guesser import Guesser, PathGuesser, Stated
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import ScoredTree, TokenTree

VOCAB_SIZE = 50


@dataclass(frozen=True)
class TrieGuesser:
    """Says what it was given for each path; a cursor is the path."""

    kind: Guesser
    paths: Mapping[tuple[int, ...], Mapping[int, float]]

    def root(self) -> object | None:
        return ()

    def step(self, cursor: object, token_id: int) -> object | None:
        assert isinstance(cursor, tuple)
        return (*cursor, token_id)

    def state(self, cursor: object, depth: int) -> Stated | None:
        assert isinstance(cursor, tuple)
        assert depth == len(cursor) + 1
        said = self.paths.get(cursor)
        return Stated(said, 2) if said else None


@st.composite
def guessers(draw: st.DrawFn) -> list[PathGuesser]:
    kinds = draw(st.lists(st.sampled_from(list(Guesser)), unique=True, max_size=4))
    made: list[PathGuesser] = []
    for kind in kinds:
        paths: dict[tuple[int, ...], dict[int, float]] = {}
        frontier: list[tuple[int, ...]] = [()]
        for _ in range(draw(st.integers(1, 8))):
            path = frontier[draw(st.integers(0, len(frontier) - 1))]
            tokens = draw(st.lists(st.integers(0, 6), unique=True, min_size=1, max_size=4))
            paths[path] = {token: draw(st.floats(0.001, 1.0)) / len(tokens) for token in tokens}
            frontier += [(*path, token) for token in tokens]
        made.append(TrieGuesser(kind, paths))
    return made


def fused(made: Sequence[PathGuesser], num_nodes: int, estimate: AcceptanceEstimate | None = None) -> FusedTree:
    """Everybody is asked everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(union, "_MIN_NGRAM_VALUE", 0.0)
        return fuse(made, Judge(estimate or AcceptanceEstimate()), num_nodes)


@settings(deadline=None, max_examples=50)
@given(made=guessers(), num_nodes=st.integers(1, 40))
def test_it_is_a_tree_within_the_budget_and_says_who_guessed(made: list[PathGuesser], num_nodes: int) -> None:
    result = fused(made, num_nodes)
    result.scored.tree.check(VOCAB_SIZE, num_nodes)
    assert len(result.node_sources) == len(result.scored.tree)
    for row in range(1, len(result.scored.tree) + 1):
        path = tuple(result.scored.tree.token_ids[above - 1] for above in result.scored.tree.path_rows(row))
        named_by = {
            guesser.kind
            for guesser in made
            if isinstance(guesser, TrieGuesser) and path[-1] in guesser.paths.get(path[:-1], {})
        }
        assert named_by
        assert (DraftSources.MODEL in result.node_sources[row - 1]) == (Guesser.MODEL in named_by)
        assert (DraftSources.NGRAM in result.node_sources[row - 1]) == (Guesser.NGRAM in named_by)
        of_text = {Guesser.OWN_TEXT, Guesser.DATASTORE} & named_by
        assert (DraftSources.RETRIEVAL in result.node_sources[row - 1]) == bool(of_text)


@settings(deadline=None, max_examples=50)
@given(made=guessers(), num_nodes=st.integers(1, 40))
def test_a_smaller_budget_keeps_the_best_of_a_larger_one(made: list[PathGuesser], num_nodes: int) -> None:
    small, large = fused(made, num_nodes), fused(made, 2 * num_nodes)
    assert large.scored.tree.token_ids[: len(small.scored.tree)] == small.scored.tree.token_ids
    assert large.scored.tree.parent_rows[: len(small.scored.tree)] == small.scored.tree.parent_rows


@settings(deadline=None, max_examples=50)
@given(made=guessers())
def test_every_guess_is_in_the_union(made: list[PathGuesser]) -> None:
    result = fused(made, 400)
    paths = {
        tuple(result.scored.tree.token_ids[above - 1] for above in result.scored.tree.path_rows(row))
        for row in range(1, len(result.scored.tree) + 1)
    }
    reachable: set[tuple[int, ...]] = {()}
    for _ in range(9):  # deeper than any path here
        reachable |= {
            (*path, token)
            for guesser in made
            if isinstance(guesser, TrieGuesser)
            for path in reachable & guesser.paths.keys()
            for token in guesser.paths[path]
        }
    assert paths == reachable - {()}


def test_ngrams_are_spared_on_paths_of_little_worth_where_others_speak() -> None:
    paths = {(): {1: 0.9, 2: 0.05}, (1,): {3: 0.9}, (2,): {4: 0.9}}
    own, ngrams = TrieGuesser(Guesser.OWN_TEXT, paths), TrieGuesser(Guesser.NGRAM, paths)
    result = fuse([own, ngrams], Judge(AcceptanceEstimate()), 10)
    of_path = {
        tuple(result.scored.tree.token_ids[above - 1] for above in result.scored.tree.path_rows(row)): source
        for row, source in enumerate(result.node_sources, start=1)
    }
    both = DraftSources.RETRIEVAL | DraftSources.NGRAM
    assert of_path == {(1,): both, (2,): both, (1, 3): both, (2, 4): DraftSources.RETRIEVAL}
    alone = fuse([ngrams], Judge(AcceptanceEstimate()), 10)
    assert len(alone.scored.tree) == 4


def test_two_who_agree_are_worth_more_than_one() -> None:
    one = TrieGuesser(Guesser.OWN_TEXT, {(): {1: 0.6}})
    other = TrieGuesser(Guesser.NGRAM, {(): {1: 0.6, 2: 0.35}})
    estimate = AcceptanceEstimate()
    alone = fused([one], 1, estimate).places[0].probabilities[1]
    together = fused([one, other], 1, estimate).places[0].probabilities[1]
    assert together > alone


def test_it_learns_whom_to_believe() -> None:
    """Both are equally sure; one is right nine times of ten, the other once."""
    estimate = AcceptanceEstimate()
    judge = Judge(estimate)
    rng = random.Random(3)
    for _ in range(300):
        good, bad = rng.sample(range(VOCAB_SIZE), 2)
        result = fuse(
            [TrieGuesser(Guesser.OWN_TEXT, {(): {bad: 0.5}}), TrieGuesser(Guesser.NGRAM, {(): {good: 0.5}})],
            judge,
            4,
        )
        draw = rng.random()
        learn(result, [good if draw < 0.9 else bad], judge)
    result = fuse(
        [TrieGuesser(Guesser.OWN_TEXT, {(): {7: 0.5}}), TrieGuesser(Guesser.NGRAM, {(): {8: 0.5}})],
        Judge(estimate),
        1,
    )
    assert result.scored.tree.token_ids == (8,)
    by_token = result.places[0].probabilities
    assert 0.75 < by_token[8] < 0.97
    assert by_token[7] < 0.25


def test_what_is_learned_holds_no_tokens() -> None:
    """Permuting the tokens of all requests changes nothing in what is shared between them."""

    def state_after(rename: Sequence[int]) -> object:
        estimate = AcceptanceEstimate()
        judge = Judge(estimate)
        rng = random.Random(5)
        for _ in range(50):
            first, second = rng.sample(range(VOCAB_SIZE), 2)
            guesser = TrieGuesser(Guesser.NGRAM, {(): {rename[first]: 0.7}, (rename[first],): {rename[second]: 0.4}})
            learn(fuse([guesser], judge, 4), [rename[first], rename[second]], judge)
        curves = [(curve._accepted, curve._tried) for both in estimate.curves for curve in both]
        return curves, estimate._weights, judge.biases

    shifted = [*range(VOCAB_SIZE)]
    random.Random(1).shuffle(shifted)
    assert state_after(range(VOCAB_SIZE)) == state_after(shifted)


def test_the_models_tree_is_kept_whole() -> None:
    tree = TokenTree((4, 5, 6, 7), (0, 0, 1, 3))
    scored = ScoredTree(tree, (-0.2, -1.8, -0.5, -0.6))
    result = fused([ModelGuesser(scored)], 10)
    assert sorted(zip(result.scored.tree.token_ids, result.scored.tree.row_depths[1:], strict=True)) == [
        (4, 1),
        (5, 1),
        (6, 2),
        (7, 3),
    ]
    assert set(result.node_sources) == {DraftSources.MODEL}


def test_an_empty_model_tree_says_nothing() -> None:
    assert fused([ModelGuesser(ScoredTree(TokenTree(), ()))], 4).scored.tree == TokenTree()
