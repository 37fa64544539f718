from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.model.growth import Candidates, LevelTree, Sharpness
from drafter_service.model.ranking import rank_candidates
from easyspec.ops.executor import choose_executor
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.speculation.ranking import NUM_NOISED_TOKENS
from easyspec.speculation.sampling import ChoiceRow, TokenHistory, choose_tokens
from tests.speculation.reference import reference_noise

GREEDY = SamplingParameters(seed=4, temperature=0.0)
RANKER = choose_executor("auto", torch.device("cpu"), num_threads=1)


def candidates(*scores: float, first_token_id: int = 0) -> Candidates:
    return Candidates(tuple(range(first_token_id, first_token_id + len(scores))), scores)


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return 3.0 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def test_greedy_rows_are_ranked_by_their_logits() -> None:
    logits = random_logits(3, 50)
    ranked = rank_candidates(RANKER, logits, [7, 8, 8], [GREEDY] * 3, 4)
    for row, expected in zip(ranked, logits.tolist(), strict=True):
        best = sorted(range(50), key=lambda token_id: -expected[token_id])[:4]
        assert row.token_ids == tuple(best)
        assert row.scores == tuple(expected[token_id] for token_id in best)


def test_sampled_rows_are_ranked_by_logits_over_temperature_plus_noise() -> None:
    """Sessions of different seeds, positions and temperatures beside a greedy one, as a batch has them."""
    samplings = [SamplingParameters(2**64 - 1, 0.7), GREEDY, SamplingParameters(3, 1.5), SamplingParameters(3, 1.5)]
    positions = [9, 9, 2, 2]
    logits = random_logits(4, 40)
    for row, ranked in enumerate(rank_candidates(RANKER, logits, positions, samplings, 40)):
        sampling = samplings[row]
        expected = [
            logits[row, token_id].item() / (sampling.temperature or 1.0)
            + (0.0 if sampling.is_greedy else float(reference_noise(sampling.seed, positions[row], token_id)))
            for token_id in range(40)
        ]
        assert ranked.token_ids == tuple(sorted(range(40), key=lambda token_id: -expected[token_id]))
        gaps = [ranked.scores[0] - score for score in ranked.scores]
        assert gaps == pytest.approx([max(expected) - expected[token_id] for token_id in ranked.token_ids], abs=1e-4)


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.floats(0.1, 3.0))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_the_first_candidate_is_what_a_verifier_with_these_logits_chooses(
    seed: int, position: int, temperature: float
) -> None:
    sampling = SamplingParameters(seed, temperature)
    logits = random_logits(1, NUM_NOISED_TOKENS, seed=position)
    chosen = choose_tokens(logits, [ChoiceRow(sampling, position, (), TokenHistory([1]))])
    assert [rank_candidates(RANKER, logits, [position], [sampling], 3)[0].token_ids[0]] == chosen


def test_a_large_vocabulary_nearly_always_gets_the_same_first_candidate() -> None:
    """Noise for the likeliest tokens only: hardly anything else wins where logits are as peaked as a model's."""
    logits = 2.0 * random_logits(200, 20 * NUM_NOISED_TOKENS)
    sampling = SamplingParameters(12, 0.8)
    ranked = rank_candidates(RANKER, logits, range(200), [sampling] * 200, 2)
    chosen = choose_tokens(logits, [ChoiceRow(sampling, place, (), TokenHistory([1])) for place in range(200)])
    num_same = sum(row.token_ids[0] == token_id for row, token_id in zip(ranked, chosen, strict=True))
    assert num_same > 195


def test_more_candidates_than_tokens_are_all_there_are() -> None:
    assert len(rank_candidates(RANKER, random_logits(1, 5), [0], [GREEDY], 8)[0].token_ids) == 5


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-30, 1e-6, 100.0])
def test_extreme_temperatures_give_finite_values_and_the_right_first_candidate(temperature: float) -> None:
    sampling = SamplingParameters(1, temperature)
    logits = random_logits(2, 30)
    ranked = rank_candidates(RANKER, logits, [3, 3], [sampling] * 2, 8)
    for row in ranked:
        assert all(math.isfinite(value) for value in row.log_probabilities(4.0))
    if temperature < 1.0:
        assert [row.token_ids[0] for row in ranked] == logits.argmax(-1).tolist()
    tree = LevelTree(TreeBudget(3, 2, 6), Sharpness())
    tree.add_level(ranked[:1])
    tree.add_level([ranked[0], ranked[1]])
    assert len(tree.scored().pruned(6).tree) == 6


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=8), st.floats(0.25, 4.0))
@settings(derandomize=True, deadline=None)
def test_probabilities_of_candidates_are_a_softmax(scores: list[float], sharpness: float) -> None:
    row = candidates(*sorted(scores, reverse=True))
    probabilities = [math.exp(value) for value in row.log_probabilities(sharpness)]
    assert sum(probabilities) == pytest.approx(1.0)
    assert probabilities == sorted(probabilities, reverse=True)
    expected = torch.softmax(sharpness * torch.tensor(row.scores, dtype=torch.float64), 0)
    assert probabilities == pytest.approx(expected.tolist(), abs=1e-12)


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.integers(0, 9)), min_size=1, max_size=300
    )
)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_sharpness_stays_in_its_range(rounds: list[tuple[list[float], int]]) -> None:
    sharpness = Sharpness()
    for scores, chosen in rounds:
        sharpness.observe(candidates(*sorted(scores, reverse=True)), chosen)
        assert 0.25 <= sharpness.value <= 4.0


@pytest.mark.parametrize("truth", [0.5, 2.0])
def test_sharpness_approaches_the_one_that_choices_follow(truth: float) -> None:
    generator = torch.Generator().manual_seed(1)
    sharpness, values = Sharpness(), []
    for _ in range(4000):
        scores = torch.randn(6, generator=generator).sort(descending=True).values
        chosen = int(torch.multinomial(torch.softmax(truth * scores, 0), 1, generator=generator))
        sharpness.observe(candidates(*scores.tolist()), chosen)
        values.append(sharpness.value)
    assert sum(values[1000:]) / 3000 == pytest.approx(truth, rel=0.2)


def test_sharpness_rises_with_hits_and_falls_with_misses() -> None:
    row = candidates(2.0, 1.0, 0.0)
    hit, miss, unknown = Sharpness(), Sharpness(), Sharpness()
    hit.observe(row, 0)
    miss.observe(row, 2)
    unknown.observe(row, 99)
    assert miss.value == unknown.value < Sharpness().value < hit.value


def grown(budget: TreeBudget, rows: Sequence[Sequence[Candidates]]) -> LevelTree:
    tree = LevelTree(budget, Sharpness())
    for level in rows:
        tree.add_level(level[: len(tree.frontier)])
    return tree


def test_the_best_nodes_of_a_level_are_expanded_and_the_best_of_all_are_kept() -> None:
    tree = LevelTree(TreeBudget(num_levels=3, width=2, num_nodes=4), Sharpness())
    tree.add_level([candidates(5.0, 4.9, 0.0)])
    assert tree.frontier == [1, 2]
    # Row 1 is unsure of its children, row 2 is sure of one: the sure one is expanded first.
    tree.add_level([candidates(1.0, 0.9, 0.8, first_token_id=10), candidates(9.0, 0.0, first_token_id=20)])
    assert [tree.token_ids[row - 1] for row in tree.frontier] == [20, 10]
    tree.add_level([candidates(3.0, 0.0, first_token_id=30), candidates(3.0, 0.0, first_token_id=40)])
    assert tree.frontier == []
    kept = tree.scored().pruned(4).tree
    assert kept.token_ids == (0, 1, 20, 30)
    assert kept.parent_rows == (0, 0, 2, 3)


def test_growth_ends_at_the_last_level_of_the_budget() -> None:
    tree = grown(TreeBudget(2, 8, 64), [[candidates(1.0, 0.0)], [candidates(1.0, 0.0)] * 2])
    assert tree.frontier == []
    assert tree.scored().tree.num_levels == 2
    assert grown(TreeBudget(1, 8, 64), [[candidates(1.0, 0.0)]]).frontier == []


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(0, 2**32),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_whatever_is_kept_is_a_tree_within_the_budget_and_the_best_of_its_size(
    num_levels: int, width: int, num_nodes: int, seed: int
) -> None:
    budget = TreeBudget(num_levels, width, num_nodes)
    tree = LevelTree(budget, Sharpness())
    while tree.frontier:
        assert len(tree.frontier) <= width
        logits = random_logits(len(tree.frontier), 12, seed + len(tree.token_ids))
        tree.add_level(rank_candidates(RANKER, logits, [0] * len(logits), [GREEDY] * len(logits), 6))
    scored = tree.scored()
    kept = scored.pruned(num_nodes).tree
    kept.check(12, num_nodes)
    assert kept.num_levels <= num_levels
    assert len(kept) == min(num_nodes, len(scored.tree))
    # No node that was left out is worth more than one that was kept.
    order = sorted(scored.log_values, reverse=True)
    value_of = {path(scored.tree, row): scored.log_values[row - 1] for row in range(1, len(scored.tree) + 1)}
    assert sorted((value_of[path(kept, row)] for row in range(1, len(kept) + 1)), reverse=True) == order[: len(kept)]


def path(tree: object, row: int) -> tuple[int, ...]:
    return tuple(tree.token_ids[above - 1] for above in tree.path_rows(row))


def test_a_level_that_cannot_bring_enough_is_not_grown() -> None:
    """Two candidates are worth nearly all: both fit a tree of two nodes, and what follows them would push them out."""
    level = [candidates(1.0, 0.0)]
    deep = LevelTree(TreeBudget(3, 2, 8), Sharpness(), least_gain=0.9)
    deep.add_level(level)
    assert deep.frontier, "one more token of what is certain to be reached"
    for least_gain, is_grown in ((0.9, False), (0.01, True)):
        tree = LevelTree(TreeBudget(3, 2, 1), Sharpness(), least_gain)
        tree.add_level([candidates(0.1, 0.0)])
        assert bool(tree.frontier) is is_grown
