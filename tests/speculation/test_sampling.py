from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyspec.speculation.coupling import gumbel_noise, signed_seed
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sampling import (
    ChoiceRow,
    TokenHistory,
    _adjusted,
    _scores,
    choose_tokens,
    tree_choice_row,
)
from easyspec.speculation.token_tree import TokenTree
from tests.speculation.reference import reference_choice, reference_processed
from tests.speculation.strategies import sampling_parameters, token_trees


def processed_logits(base_logits: torch.Tensor, rows: Sequence[ChoiceRow]) -> torch.Tensor:
    """What choices are made from, without noise: -inf where filtered out; greedy rows go as far as the mask."""
    processed = _adjusted(base_logits, rows).clone()
    sampled = [index for index, row in enumerate(rows) if not row.sampling.is_greedy]
    if sampled:
        processed[sampled] = _scores(processed[sampled], [rows[index] for index in sampled])
    return processed


V = 7
tokens = st.lists(st.integers(0, V - 1), max_size=6)
logit = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 5.0]), st.floats(-30.0, 30.0, width=32))
PLAIN = SamplingParameters(seed=3)
EVERYTHING = SamplingParameters(
    seed=2**63 + 5,
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=-0.2,
    logit_bias={3: 2.5, 11: -100.0},
)


def row(sampling: SamplingParameters, position: int = 0, path: Sequence[int] = ()) -> ChoiceRow:
    return ChoiceRow(sampling, position, tuple(path), TokenHistory([0]))


def processed(logits: list[float], sampling: SamplingParameters, path: Sequence[int] = ()) -> list[float]:
    return processed_logits(torch.tensor([logits]), [row(sampling, 0, path)])[0].tolist()


def kept(logits: list[float], sampling: SamplingParameters) -> list[int]:
    return np.isfinite(processed(logits, sampling)).nonzero()[0].tolist()


def packed(allowed: Sequence[int]) -> np.ndarray:
    return np.packbits([token_id in allowed for token_id in range(V)], bitorder="little")


masks = st.one_of(st.none(), st.lists(st.integers(0, V - 1), min_size=1, unique=True))
Session = tuple[list[int], list[int], SamplingParameters, TokenTree, list[list[float]], list[list[int] | None]]


@st.composite
def sessions(draw: st.DrawFn) -> Session:
    """A session at a round: prompt, output, parameters, tree, and the base logits and masks of the tree's rows."""
    prompt = draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=6))
    tree = draw(token_trees(V, max_nodes=5))
    logits = st.lists(logit, min_size=V, max_size=V)
    rows = draw(st.lists(logits, min_size=len(tree) + 1, max_size=len(tree) + 1))
    allowed = draw(st.lists(masks, min_size=len(rows), max_size=len(rows)))
    return prompt, draw(tokens), draw(sampling_parameters(V)), tree, rows, allowed


@given(st.lists(sessions(), min_size=1, max_size=4))
@settings(derandomize=True, deadline=None, max_examples=100)
def test_rows_of_many_sessions_follow_the_literal_rule(batch: list) -> None:
    rows: list[ChoiceRow] = []
    base_logits: list[list[float]] = []
    expected_logits, expected_choices = [], []
    for prompt, output, sampling, tree, logits, masks in batch:
        history, base_length = TokenHistory(prompt, output), len(prompt) + len(output)
        session_rows = [tree_choice_row(tree, row, base_length, sampling, history) for row in range(len(tree) + 1)]
        session_rows = [
            choice_row if allowed is None else replace(choice_row, allowed_bits=packed(allowed))
            for choice_row, allowed in zip(session_rows, masks, strict=True)
        ]
        for choice_row, row_logits, allowed in zip(session_rows, logits, masks, strict=True):
            where = prompt, output, choice_row.path_token_ids, allowed
            expected_logits.append(reference_processed(row_logits, sampling, *where))
            expected_choices.append(reference_choice(row_logits, sampling, choice_row.position, *where))
        rows += session_rows
        base_logits += logits
    tensor = torch.tensor(base_logits)
    before = tensor.clone()
    assert choose_tokens(tensor, rows) == expected_choices
    np.testing.assert_array_equal(processed_logits(tensor, rows).numpy(), np.array(expected_logits))
    assert torch.equal(tensor, before)


def test_sessions_that_share_parameters_keep_their_own_history() -> None:
    sampling = SamplingParameters(seed=0, temperature=0.0, presence_penalty=1.0)
    rows = [ChoiceRow(sampling, 2, (), TokenHistory([0], [token_id])) for token_id in (1, 2)]
    assert processed_logits(torch.zeros(2, 3), rows).tolist() == [[0, -1, 0], [0, 0, -1]]


@pytest.mark.parametrize("vocab_size", [7, 64, 2**14 + 3])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_neither_bias_nor_penalties_nor_filters_defeat_a_mask(vocab_size: int, temperature: float) -> None:
    """Also where noise is only made for tokens that can win; with one allowed token it is always chosen."""
    sampling = replace(
        PLAIN,
        temperature=temperature,
        top_k=1,
        min_p=1.0,
        logit_bias={3: 100.0, 5: -100.0},
        repetition_penalty=100.0,
        frequency_penalty=2.0,
    )
    allowed = np.packbits(np.arange(vocab_size) == 5, bitorder="little")
    rows = [
        ChoiceRow(sampling, position, (), TokenHistory([5], [5] * 50), allowed if position % 2 else None)
        for position in range(6)
    ]
    logits = torch.full((6, vocab_size), 50.0)
    logits[:, 5] = -1e30
    choices = choose_tokens(logits, rows)
    assert choices[1::2] == [5, 5, 5]
    assert 5 not in choices[::2]
    assert choose_tokens(logits[1::2], rows[1::2]) == [5, 5, 5]


def test_no_rows() -> None:
    assert choose_tokens(torch.zeros(0, V), []) == []


def test_rows_and_logits_must_match() -> None:
    with pytest.raises(AssertionError, match="2 rows of logits for 1 rows"):
        choose_tokens(torch.zeros(2, V), [row(PLAIN)])


def test_processed_logits_are_a_copy() -> None:
    for sampling in (PLAIN, replace(PLAIN, temperature=0.0)):
        base_logits = torch.arange(4.0).repeat(1, 1)
        processed_logits(base_logits, [row(sampling)]).zero_()
        assert base_logits.tolist() == [[0, 1, 2, 3]]


def test_tree_rows_carry_their_path_and_position() -> None:
    tree = TokenTree((5, 6, 7, 8), (0, 0, 1, 3))
    rows = [tree_choice_row(tree, row, 10, PLAIN, TokenHistory([1])) for row in range(5)]
    assert [(row.position, row.path_token_ids) for row in rows] == [
        (10, ()),
        (11, (5,)),
        (11, (6,)),
        (12, (5, 7)),
        (13, (5, 7, 8)),
    ]


def test_top_k_keeps_every_tie_of_the_last() -> None:
    assert kept([1.0, 3.0, 2.0, 2.0, 0.0], replace(PLAIN, top_k=2)) == [1, 2, 3]
    assert kept([1.0, 3.0, 2.0, 2.0, 0.0], replace(PLAIN, top_k=1)) == [1]
    assert kept([1.0, 3.0, 2.0, 2.0, 0.0], replace(PLAIN, top_k=99)) == [0, 1, 2, 3, 4]


def test_top_p_keeps_the_smallest_prefix_and_its_ties() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    assert kept(logits, replace(PLAIN, top_p=0.39)) == [1]
    assert kept(logits, replace(PLAIN, top_p=0.41)) == [1, 3]
    assert kept(logits, replace(PLAIN, top_p=0.71)) == [1, 2, 3]
    assert kept([0.0] * 4, replace(PLAIN, top_p=1e-9)) == [0, 1, 2, 3]


def test_top_p_is_renormalised_after_top_k() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    # 0.4 of the 0.7 that top-k leaves is 0.57.
    assert kept(logits, replace(PLAIN, top_k=2, top_p=0.56)) == [1]
    assert kept(logits, replace(PLAIN, top_p=0.56)) == [1, 3]


@pytest.mark.parametrize("vocab_size", [100, 3_000, 30_000])
def test_top_p_beyond_the_first_candidates(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(1, vocab_size, generator=generator)
    for top_p in (0.1, 0.5, 0.9, 0.999):
        actual = processed_logits(logits, [row(replace(PLAIN, top_p=top_p))]).isfinite()
        probabilities, order = logits[0].double().softmax(-1).sort(descending=True)
        num_kept = int((probabilities.cumsum(-1) < top_p).sum()) + 1
        assert actual[0].nonzero().squeeze(1).tolist() == sorted(order[:num_kept].tolist())


def test_min_p_is_relative_to_the_best() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    assert kept(logits, replace(PLAIN, min_p=0.51)) == [1, 3]
    assert kept(logits, replace(PLAIN, min_p=0.49)) == [1, 2, 3]
    assert kept(logits, replace(PLAIN, min_p=1.0)) == [1]


def test_penalties_look_where_they_should() -> None:
    history = TokenHistory([0, 1], [1, 2])
    penalised = SamplingParameters(
        seed=0, temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    rows = [ChoiceRow(penalised, 9, path, history) for path in ((), (2, 3, 3))]
    actual = processed_logits(torch.tensor([[4.0, -4.0, 4.0, 4.0, 4.0]] * 2), rows)
    assert actual[0].tolist() == [2.0, -8.75, 1.25, 4.0, 4.0]
    assert actual[1].tolist() == [2.0, -8.75, 1.0, 1.0, 4.0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-10])
def test_the_smallest_temperatures_choose_the_best(temperature: float) -> None:
    cold = replace(PLAIN, temperature=temperature)
    rows = [row(cold, position) for position in range(200)]
    assert set(choose_tokens(torch.tensor([[3.0, 3.5, -1e30, 3.4999]] * 200), rows)) == {1}


@pytest.mark.parametrize("vocab_size", [1_001, 16_383, 20_011])
def test_a_row_is_the_same_bits_whatever_else_is_in_the_call(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    settings_of_rows = [
        EVERYTHING,
        PLAIN,
        replace(PLAIN, temperature=0.0),
        replace(PLAIN, top_p=0.95),
        replace(PLAIN, top_p=0.2, top_k=500),
        replace(EVERYTHING, temperature=0.0),
        replace(PLAIN, min_p=0.1, temperature=2.0),
        replace(PLAIN, frequency_penalty=1.0),
    ]
    history = TokenHistory(list(range(50)), [4, 4, 60])
    rows = [
        ChoiceRow(sampling, 100 + len(path), path, history)
        for sampling in settings_of_rows
        for path in ((), (7,), (7, 9))
    ]
    base_logits = torch.randn(len(rows), vocab_size, generator=generator) * 3
    together, choices = processed_logits(base_logits, rows), choose_tokens(base_logits, rows)
    for index in range(len(rows)):
        alone = base_logits[index : index + 1]
        assert torch.equal(processed_logits(alone, rows[index : index + 1])[0], together[index])
        assert choose_tokens(alone, rows[index : index + 1]) == [choices[index]]
    order = torch.randperm(len(rows), generator=generator).tolist()[: len(rows) // 2]
    shuffled = [rows[index] for index in order]
    assert torch.equal(processed_logits(base_logits[order], shuffled), together[order])
    assert choose_tokens(base_logits[order], shuffled) == [choices[index] for index in order]


def wide_logits(kind: str) -> torch.Tensor:
    logits = torch.randn(12, 20_011, generator=torch.Generator().manual_seed(5)) * 3
    if kind == "flat":
        return torch.zeros_like(logits)
    if kind == "one sure":
        logits[:, 4_321] = 1e4
    if kind == "mostly masked":
        logits[:, 9:20_000] = -torch.inf
    return logits


@pytest.mark.parametrize("kind", ["model", "flat", "one sure", "mostly masked"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
def test_pruning_never_changes_a_choice(kind: str, temperature: float) -> None:
    base_logits = wide_logits(kind)
    rows = [row(SamplingParameters(seed=seed, temperature=temperature), seed // 3) for seed in range(12)]
    seeds = torch.tensor([signed_seed(row.sampling.seed) for row in rows])
    noise = gumbel_noise(seeds, torch.tensor([row.position for row in rows]), torch.arange(20_011))
    expected = (processed_logits(base_logits, rows) + noise).argmax(-1).tolist()
    assert choose_tokens(base_logits, rows) == expected


@pytest.mark.parametrize("position", range(5))
def test_pruning_keeps_a_winner_from_far_below(position: int) -> None:
    """The best token has the least noise of the row, and the one with the most lies just within or beyond its reach."""
    noise = gumbel_noise(torch.tensor([3]), torch.tensor([position]), torch.arange(20_011))[0]
    best, contender = int(noise.argmin()), int(noise.argmax())
    reach = float(noise[contender] - noise[best])
    base_logits = torch.full((2, 20_011), -1e4)
    base_logits[:, best] = 0.0
    base_logits[:, contender] = torch.tensor([-reach + 1e-3, -reach - 1e-3])
    assert choose_tokens(base_logits, [row(PLAIN, position)] * 2) == [contender, best]


def test_history_counts_and_grows() -> None:
    history = TokenHistory([5, 6, 5], [6])
    for token_id in range(100, 140):
        history.commit([token_id, 7])
    counts = dict(zip(history.token_ids.tolist(), history.output_counts.tolist(), strict=True))
    assert counts == {5: 0, 6: 1, 7: 40} | dict.fromkeys(range(100, 140), 1)
    assert [history.token_ids[slot].item() for slot in history.slots.values()] == list(history.slots)


def test_committing_equals_starting_with_the_output() -> None:
    grown = TokenHistory([1, 2])
    grown.commit([2, 3])
    grown.commit([3])
    whole = TokenHistory([1, 2], [2, 3, 3])
    assert grown.token_ids.tolist() == whole.token_ids.tolist() == [1, 2, 3]
    assert grown.output_counts.tolist() == whole.output_counts.tolist() == [0, 1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_waits_once() -> None:
    history, tree = TokenHistory([1, 2], [3]), TokenTree((5, 6, 7), (0, 0, 1))
    rows = [tree_choice_row(tree, row, 10, EVERYTHING, history) for row in range(4)]
    base_logits = torch.randn(4, 5_000, device="cuda")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            choose_tokens(base_logits, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1
