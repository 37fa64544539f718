from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyspec.speculation.coupling import (
    MIN_GUMBEL_NOISE,
    gumbel_noise,
    gumbel_of_bits,
    signed_seed,
    uniform_bits,
)
from easyspec.speculation.parameters import MAX_SEED
from tests.speculation.reference import reference_bits, reference_noise

MAX_GUMBEL_NOISE = 22.873857498168945

GOLDEN = [
    (0, 0, 0, 595752380, -0.6807578206062317),
    (7, 0, 0, 158293246, -1.1941497325897217),
    (7, 1, 0, 1649549703, 0.04401291534304619),
    (7, 0, 1, 2379784387, 0.5268973112106323),
    (2**64 - 1, 2**31, 152063, 1990304677, 0.26246118545532227),
    (2**63, 1, 2, 3067717799, 1.0891273021697998),
    (12345678901234567890, 1000, 4095, 2077920493, 0.32010015845298767),
]
seeds = st.integers(0, MAX_SEED)
positions = st.integers(0, 2**31)
token_ids = st.integers(0, 2**20)


def one(seed: int, position: int, token_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor([signed_seed(seed)]), torch.tensor([position]), torch.tensor([token_id])


def bits_of(seed: list[int], position: list[int], num_tokens: int) -> np.ndarray:
    return uniform_bits(torch.tensor(seed), torch.tensor(position), torch.arange(num_tokens)).numpy()


@pytest.mark.parametrize(("seed", "position", "token_id", "bits", "noise"), GOLDEN)
def test_noise_never_changes(seed: int, position: int, token_id: int, bits: int, noise: float) -> None:
    assert uniform_bits(*one(seed, position, token_id)).item() == bits
    assert gumbel_noise(*one(seed, position, token_id)).item() == noise


@given(seeds, positions, token_ids)
@settings(derandomize=True, deadline=None, max_examples=200)
def test_noise_is_nested_splitmix64(seed: int, position: int, token_id: int) -> None:
    assert uniform_bits(*one(seed, position, token_id)).item() == reference_bits(seed, position, token_id)
    assert gumbel_noise(*one(seed, position, token_id)).item() == reference_noise(seed, position, token_id)


def test_noise_does_not_depend_on_the_tensor_around_it() -> None:
    seed, position, tokens = torch.arange(-3, 4), torch.arange(7) * 1000, torch.arange(40_003)
    noise = gumbel_noise(seed, position, tokens)
    assert noise.dtype == torch.float32
    assert noise.shape == (7, 40_003)
    for row in range(7):
        assert torch.equal(noise[row], gumbel_noise(seed[row : row + 1], position[row : row + 1], tokens)[0])
    few = torch.tensor([[5, 40_002, 32_768]] * 7) + torch.arange(7).unsqueeze(1) % 2 * -5
    assert torch.equal(gumbel_noise(seed, position, few), noise.gather(1, few))


def test_noise_limits_are_those_of_the_extreme_bits() -> None:
    extremes = gumbel_of_bits(torch.tensor([0, 2**32 - 1]))
    assert extremes.tolist() == [MIN_GUMBEL_NOISE, MAX_GUMBEL_NOISE]
    assert pytest.approx(-math.log(33 * math.log(2)), rel=1e-6) == MIN_GUMBEL_NOISE
    assert pytest.approx(33 * math.log(2), rel=1e-6) == MAX_GUMBEL_NOISE


def test_noise_grows_with_its_bits() -> None:
    step = torch.arange(0, 2**32, 2**14 + 1)
    noise = gumbel_of_bits(torch.cat([step, torch.arange(2**32 - 1000, 2**32)]).sort().values)
    assert bool((noise[1:] >= noise[:-1]).all())


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, MAX_SEED])
@pytest.mark.parametrize("position", [0, 2**31 - 1, 2**63 - 1])
def test_noise_is_finite_at_extremes(seed: int, position: int) -> None:
    noise = gumbel_noise(torch.tensor([signed_seed(seed)]), torch.tensor([position]), torch.arange(50_000))
    assert bool(torch.isfinite(noise).all())
    assert MIN_GUMBEL_NOISE <= noise.min().item() < -2.0
    assert 7.0 < noise.max().item() <= MAX_GUMBEL_NOISE


@pytest.mark.parametrize("axis", ["token", "position", "seed"])
def test_noise_is_gumbel_distributed_along_every_axis(axis: str) -> None:
    n = 50_000
    index, same = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    if axis == "token":
        noise = gumbel_noise(same[:1] + 11, same[:1] + 3, index)[0]
    else:
        seed, position = (index, same + 3) if axis == "seed" else (same + 11, index)
        noise = gumbel_noise(seed, position, torch.tensor([17]))[:, 0]
    assert scipy.stats.kstest(noise.double().numpy(), "gumbel_r").pvalue > 1e-3
    # The same test sees a small shift.
    assert scipy.stats.kstest(noise.double().numpy() + 0.04, "gumbel_r").pvalue < 1e-3


def test_every_bit_is_fair() -> None:
    bits = bits_of([1, 2, 3, 4], [0, 1, 2, 3], 25_000).ravel()
    ones = np.array([((bits >> place) & 1).sum() for place in range(32)])
    assert np.abs(ones - bits.size / 2).max() < 4.5 * math.sqrt(bits.size) / 2


NEIGHBOURS = {
    "next token": (0, 0, 1),
    "next position": (0, 1, 0),
    "next seed": (1, 0, 0),
    "seed up, position down": (1, -1, 0),
    "position up, token down": (0, 1, -1),
    "far seed": (2**40, 0, 0),
}


@pytest.mark.parametrize("step", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_neighbours_are_independent(step: tuple[int, int, int]) -> None:
    seed = torch.arange(30).repeat_interleave(30)
    position = torch.arange(30).repeat(30) + 1
    tokens = torch.arange(1, 60)
    here = uniform_bits(seed, position, tokens).numpy().ravel()
    there = uniform_bits(seed + step[0], position + step[1], tokens + step[2]).numpy().ravel()
    assert dependence_p_value(here, there) > 1e-3


def test_the_independence_test_can_fail() -> None:
    here = bits_of(list(range(100)), [1] * 100, 500).ravel()
    there = bits_of(list(range(100)), [2] * 100, 500).ravel()
    linear = (here + (there >> 4)) % 2**32
    assert dependence_p_value(here, linear) < 1e-6


def dependence_p_value(here: np.ndarray, there: np.ndarray) -> float:
    """Smallest p-value, times the number of tests: high and low bits against each other, and the correlation."""
    p_values = [scipy.stats.pearsonr(here, there).pvalue]
    for shift_here in (0, 28):
        for shift_there in (0, 28):
            table = np.zeros((16, 16))
            np.add.at(table, ((here >> shift_here) & 15, (there >> shift_there) & 15), 1)
            p_values.append(scipy.stats.chi2_contingency(table).pvalue)
    return float(min(p_values) * len(p_values))


def test_no_two_places_share_their_noise() -> None:
    seed = torch.arange(200).repeat_interleave(200)
    position = torch.arange(200).repeat(200)
    bits = uniform_bits(seed, position, torch.tensor([0, 1]))
    assert len(set(map(tuple, bits.tolist()))) == 200 * 200


def test_signed_seed_is_twos_complement() -> None:
    assert [signed_seed(seed) for seed in (0, 2**63 - 1, 2**63, MAX_SEED)] == [0, 2**63 - 1, -(2**63), -1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_makes_the_same_noise() -> None:
    arguments = torch.arange(-4, 4), torch.arange(8) * 999, torch.arange(152_064)
    noise = gumbel_noise(*arguments)
    noise_on_gpu = gumbel_noise(*(argument.cuda() for argument in arguments)).cpu()
    bits_on_gpu = uniform_bits(*(argument.cuda() for argument in arguments)).cpu()
    assert torch.equal(uniform_bits(*arguments), bits_on_gpu)
    # The float64 logarithms may differ in their last bit, which rounding to float32 shows about once in 10^8.
    assert (noise != noise_on_gpu).sum().item() <= 1
    torch.testing.assert_close(noise, noise_on_gpu, rtol=2e-7, atol=1e-9)
