"""Samples follow the base distribution, measured with a chi-square test on a small vocabulary, fixed seeds.

They are drawn by what the verifier runs: an executor's choice, and its verdicts on trees.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from easyspec.ops.executor import Executor, choose_executor
from easyspec.speculation.acceptance import StopLimits
from easyspec.speculation.coupling import gumbel_noise
from easyspec.speculation.messages import Verdict
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sampling import ChoiceRow, TokenHistory
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from verifier_service.verdicts import Case, decide

NUM_SAMPLES = 20_000
LOGITS = (2.0, 1.2, 0.9, 0.9, 0.0, -0.5, -1.5, -2.5)
PATH = (0, 2, 2)
PROMPT = (1, 4)
BASE = SamplingParameters(seed=2024)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - np.max(logits))
    return np.asarray(weights / weights.sum())


def kept_only(probabilities: np.ndarray, token_ids: list[int]) -> np.ndarray:
    mask = np.isin(np.arange(len(probabilities)), token_ids)
    return np.asarray(probabilities * mask / (probabilities * mask).sum())


def shifted(changes: dict[int, float]) -> np.ndarray:
    logits = np.array(LOGITS)
    for token_id, change in changes.items():
        logits[token_id] += change
    return softmax(logits)


PLAIN = softmax(np.array(LOGITS))
# Each distribution is worked out by hand from the parameter's definition.
CASES = {
    "temperature 1": (BASE, PLAIN),
    "temperature 0.5": (replace(BASE, temperature=0.5), softmax(np.array(LOGITS) / 0.5)),
    "temperature 3": (replace(BASE, temperature=3.0), softmax(np.array(LOGITS) / 3.0)),
    "top_k 2": (replace(BASE, top_k=2), kept_only(PLAIN, [0, 1])),
    "top_k 3 and a tie": (replace(BASE, top_k=3), kept_only(PLAIN, [0, 1, 2, 3])),
    "top_p 0.6": (replace(BASE, top_p=0.6), kept_only(PLAIN, [0, 1])),
    "min_p 0.12": (replace(BASE, min_p=0.12), kept_only(PLAIN, [0, 1, 2, 3, 4])),
    "logit bias": (replace(BASE, logit_bias={7: 3.0, 0: -1.0}), shifted({7: 3.0, 0: -1.0})),
    "repetition": (replace(BASE, repetition_penalty=2.0), shifted({0: -1.0, 1: -0.6, 2: -0.45})),
    "presence": (replace(BASE, presence_penalty=1.0), shifted({0: -1.0, 2: -1.0})),
    "frequency": (replace(BASE, frequency_penalty=-0.5), shifted({0: 0.5, 2: 1.0})),
}


@pytest.fixture(scope="module", params=["native", "reference"])
def executor(request: pytest.FixtureRequest) -> Executor:
    return choose_executor(request.param, torch.device("cpu"), num_threads=1)


def samples(executor: Executor, sampling: SamplingParameters) -> np.ndarray:
    history = TokenHistory(PROMPT)
    rows = [ChoiceRow(sampling, position, PATH, history) for position in range(NUM_SAMPLES)]
    return np.array(executor.choose_tokens(torch.tensor(LOGITS).repeat(NUM_SAMPLES, 1), rows))


def p_value(choices: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square; 0 if something impossible was chosen."""
    observed = np.bincount(choices, minlength=len(probabilities))
    possible = probabilities > 0
    if observed[~possible].any():
        return 0.0
    if possible.sum() == 1:
        return 1.0
    return float(scipy.stats.chisquare(observed[possible], len(choices) * probabilities[possible]).pvalue)


@pytest.mark.parametrize(("sampling", "probabilities"), CASES.values(), ids=CASES.keys())
def test_samples_follow_the_processed_distribution(
    executor: Executor, sampling: SamplingParameters, probabilities: np.ndarray
) -> None:
    choices = samples(executor, sampling)
    assert p_value(choices, probabilities) > 1e-3
    # The test has the power to see a distribution that is a tenth off.
    off = probabilities * np.where(np.arange(len(probabilities)) % 2, 1.1, 1.0)
    assert p_value(choices, off / off.sum()) < 1e-3


def test_samples_follow_the_distribution_over_seeds(executor: Executor) -> None:
    history = TokenHistory(PROMPT)
    rows = [ChoiceRow(replace(BASE, seed=seed), 0, PATH, history) for seed in range(NUM_SAMPLES)]
    choices = executor.choose_tokens(torch.tensor(LOGITS).repeat(NUM_SAMPLES, 1), rows)
    assert p_value(np.array(choices), PLAIN) > 1e-3


STEP_LOGITS = torch.tensor([[1.0, 0.0, -0.5], [0.0, 1.5, 0.5], [-1.0, 0.0, 0.3], [0.2, 0.1, 2.0]])
TREES = {"no tree": EMPTY_TREE, "chain": TokenTree((0, 1), (0, 1)), "wide": TokenTree((0, 1, 2, 2), (0, 0, 0, 1))}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_pairs_of_tokens_follow_the_joint_distribution_through_a_tree(executor: Executor, tree: TokenTree) -> None:
    """Two tokens of a model whose logits depend on the last token (row 0: none), drafted by a fixed tree."""
    pairs = np.array([two_tokens(executor, seed, tree) for seed in range(2_500)])
    first = STEP_LOGITS[0].double().softmax(-1).numpy()
    second = STEP_LOGITS[1:].double().softmax(-1).numpy()
    assert p_value(pairs, (first[:, None] * second).ravel()) > 1e-3
    assert p_value(pairs, (first[:, None] * first[None, :]).ravel()) < 1e-6


def two_tokens(executor: Executor, seed: int, tree: TokenTree) -> int:
    history = TokenHistory([0])
    emitted: list[int] = []
    sampling = SamplingParameters(seed=seed)
    while len(emitted) < 2:
        case = Case(tree, 1 + len(emitted), sampling, history, StopLimits(frozenset(), 3))
        last = [(*emitted, *row.path_token_ids)[-1:] for row in case.choice_rows()]
        base_logits = torch.stack([STEP_LOGITS[token[0] + 1 if token else 0] for token in last])
        (verdict,) = decide(executor, base_logits, [case])
        assert isinstance(verdict, Verdict)
        emitted += verdict.token_ids
    return 3 * emitted[0] + emitted[1]


BASE_PROBABILITIES = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
DRAFT_PROBABILITIES = np.array([0.2, 0.35, 0.05, 0.25, 0.05, 0.1])


def noise_of(seed: int) -> np.ndarray:
    positions = torch.arange(NUM_SAMPLES)
    return gumbel_noise(torch.full_like(positions, seed), positions, torch.arange(6)).double().numpy()


def ratio_test_choices(residual_noise: np.ndarray) -> np.ndarray:
    """Speculative sampling by the ratio test, the draft token drawn with the noise of seed 1."""
    draft = (np.log(DRAFT_PROBABILITIES) + noise_of(1)).argmax(-1)
    ratio = (BASE_PROBABILITIES / DRAFT_PROBABILITIES)[draft]
    accepted = np.random.default_rng(0).random(NUM_SAMPLES) < ratio
    with np.errstate(divide="ignore"):
        residual = np.log(np.maximum(BASE_PROBABILITIES - DRAFT_PROBABILITIES, 0.0))
    return np.where(accepted, draft, (residual + residual_noise).argmax(-1))


def test_shared_noise_with_the_ratio_test_is_biased_and_seen() -> None:
    assert p_value(ratio_test_choices(noise_of(2)), BASE_PROBABILITIES) > 1e-3
    assert p_value(ratio_test_choices(noise_of(1)), BASE_PROBABILITIES) < 1e-6


def test_shared_noise_makes_draft_and_base_agree_as_often_as_the_theory_says() -> None:
    """Daliri, Musco, Suresh, arXiv 2408.07978: sum over i of 1 / sum over j of max(p_j / p_i, q_j / q_i)."""
    base = (np.log(BASE_PROBABILITIES) + noise_of(1)).argmax(-1)
    draft = (np.log(DRAFT_PROBABILITIES) + noise_of(1)).argmax(-1)
    expected = 0.0
    for p, q in zip(BASE_PROBABILITIES, DRAFT_PROBABILITIES, strict=True):
        expected += 1 / np.maximum(BASE_PROBABILITIES / p, DRAFT_PROBABILITIES / q).sum()
    assert (base == draft).mean() == pytest.approx(expected, abs=4 * 0.5 / NUM_SAMPLES**0.5)
    distance = np.abs(BASE_PROBABILITIES - DRAFT_PROBABILITIES).sum() / 2
    assert expected >= (1 - distance) / (1 + distance)
    independent = (np.log(DRAFT_PROBABILITIES) + noise_of(2)).argmax(-1)
    assert (base == independent).mean() < expected - 0.2


def test_positions_are_sampled_independently(executor: Executor) -> None:
    choices = samples(executor, BASE)
    table = np.zeros((8, 8))
    for first, second in itertools.pairwise(choices):
        table[first, second] += 1
    assert scipy.stats.chi2_contingency(table[:6, :6]).pvalue > 1e-3
