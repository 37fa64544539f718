from __future__ import annotations

import dataclasses

import pytest

from bench.decode.samples import PLAIN, select_modes
from bench.decode.summary import summarize
from bench.harness.streams import Counts
from tests.bench.decode.samples import drafted_sample, plain_sample

STAGED = select_modes(["n4-staged"])[1]
TOKENS = tuple(range(7))


def test_a_drafted_mode_is_compared_with_plain_prompt_by_prompt() -> None:
    samples = [
        plain_sample(PLAIN, 0, 0.1, TOKENS),  # 10 tokens/s
        plain_sample(PLAIN, 1, 0.2, TOKENS),  # 5 tokens/s
        drafted_sample(STAGED, 0, 0.1, TOKENS),  # 30 tokens/s
        drafted_sample(STAGED, 1, 0.3, TOKENS),  # 10 tokens/s
    ]
    plain, staged = summarize(samples)
    assert (plain["mode"], plain["layer_parallel_size"], plain["draft_ms_per_round"]) == ("plain", None, None)
    assert plain["tokens_per_s"] == pytest.approx(7.5)
    assert plain["speedup_vs_plain"] == pytest.approx(1.0)
    assert plain["acceptance_rate"] is plain["mean_acceptance_length"] is None
    assert (staged["layer_parallel_size"], staged["mlp"], staged["calibration"]) == (4, "staged", True)
    assert staged["tokens_per_s"] == pytest.approx(20.0)
    assert staged["speedup_vs_plain"] == pytest.approx((3.0 + 2.0) / 2)
    assert staged["speedup_quartiles"] == pytest.approx((2.25, 2.75))


def test_times_are_per_round_and_per_fuzzy_step() -> None:
    staged = summarize([plain_sample(PLAIN, 0, 0.1, TOKENS), drafted_sample(STAGED, 0, 0.1, TOKENS)])[1]
    assert staged["draft_ms_per_round"] == pytest.approx(10)
    assert staged["calibrate_ms_per_round"] == pytest.approx(2)
    assert staged["fuzzy_ms_per_round"] == pytest.approx(8)
    assert staged["fuzzy_ms_per_step"] == pytest.approx(2)  # four steps a round
    assert staged["verify_ms_per_round"] == pytest.approx(20)
    assert staged["overhead_ms_per_round"] == pytest.approx(1)


def test_acceptance_counts_levels_as_the_paper_does() -> None:
    staged = summarize([plain_sample(PLAIN, 0, 0.1, TOKENS), drafted_sample(STAGED, 0, 0.1, TOKENS)])[1]
    assert staged["acceptance_rate"] == pytest.approx(2 / 5)
    assert staged["acceptance_by_level"] == (1.0, 1.0, 0.0, 0.0, 0.0)
    assert staged["mean_acceptance_length"] == pytest.approx(3.0)  # 1 + 4 accepted tokens / 2 drafted rounds
    assert staged["draft_token_acceptance_rate"] == pytest.approx(4 / 20)
    assert staged["draft_tokens_per_round"] == pytest.approx(10)


def test_acceptance_pools_completions_of_different_depth() -> None:
    deep = drafted_sample(STAGED, 0, 0.1, TOKENS)
    shallow = dataclasses.replace(deep, prompt_index=1, counts=Counts((4,), (1,)))
    samples = [plain_sample(PLAIN, index, 0.1, TOKENS) for index in (0, 1)]
    staged = summarize([*samples, deep, shallow])[1]
    assert staged["acceptance_by_level"] == pytest.approx((3 / 6, 1.0, 0.0, 0.0, 0.0))
    assert staged["acceptance_rate"] == pytest.approx((4 + 1) / (10 + 4))


def test_a_completion_that_differs_from_plain_is_counted() -> None:
    other = drafted_sample(STAGED, 0, 0.1, (*TOKENS[:-1], 99))
    staged = summarize([plain_sample(PLAIN, 0, 0.1, TOKENS), other])[1]
    assert staged["num_differing_completions"] == 1


def test_temperatures_are_compared_each_with_its_own_plain() -> None:
    samples = [
        dataclasses.replace(sample, temperature=temperature)
        for temperature, seconds in ((0.8, 0.2), (0.0, 0.1))
        for sample in (plain_sample(PLAIN, 0, seconds, TOKENS), drafted_sample(STAGED, 0, 0.1, TOKENS))
    ]
    results = summarize(samples)
    assert [(row["temperature"], row["mode"]) for row in results] == [
        (0.0, "plain"),
        (0.0, "n4-staged"),
        (0.8, "plain"),
        (0.8, "n4-staged"),
    ]
    assert [row["speedup_vs_plain"] for row in results] == pytest.approx([1.0, 3.0, 1.0, 6.0])
