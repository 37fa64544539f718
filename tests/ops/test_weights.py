from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyspec.ops.weights import GROUP_SIZE, DenseWeight, QuantisedWeight, can_stack, quantise, stack_outputs

# Of a scale's or a minimum's float16: half a step of normal numbers, relative, and a step of the smallest ones.
HALF_STEP, LEAST_STEP = 2.0**-11, 2.0**-24


def random_values(num_outputs: int, num_inputs: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 99), num_inputs=st.integers(1, 130), size=st.sampled_from([1e-3, 1.0, 300.0]))
def test_rounding_is_to_the_nearest_code(seed: int, num_inputs: int, size: float) -> None:
    values = random_values(3, num_inputs, seed) * size
    for bits, num_codes in ((8, 254), (4, 15)):
        weight = quantise(values, bits)
        assert weight.shape == values.shape
        assert weight.scales.shape == (3, -(-num_inputs // GROUP_SIZE))
        assert (weight.minima is None) == (bits == 8)
        for start in range(0, num_inputs, GROUP_SIZE):
            part = values[:, start : start + GROUP_SIZE]
            whole = torch.nn.functional.pad(part, (0, GROUP_SIZE - part.shape[1]))  # what fills a group up is in it
            span = 2 * whole.abs().amax(dim=1) if bits == 8 else whole.amax(dim=1) - whole.amin(dim=1)
            most = span / num_codes / 2 + 2 * HALF_STEP * whole.abs().amax(dim=1) + span * HALF_STEP
            most += num_codes * LEAST_STEP
            error = (weight.dense()[:, start : start + GROUP_SIZE] - part).abs().amax(dim=1)
            assert (error <= most).all(), start


def test_codes_and_scales_are_what_the_formats_hold() -> None:
    values = random_values(5, 96) * 4.0
    eight, four = quantise(values, 8), quantise(values, 4)
    assert eight.codes.dtype == four.codes.dtype == torch.int8
    assert int(eight.codes.min()) >= -127
    assert int(four.codes.min()) >= 0
    assert int(four.codes.max()) <= 15
    assert four.minima is not None
    for exact in (eight.scales, four.scales, four.minima):
        assert torch.equal(exact, exact.half().float())


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_of_one_value_are_exact(bits: int) -> None:
    """Zeros, which have no scale, and whatever float16 holds."""
    assert torch.equal(quantise(torch.zeros(2, 40), bits).dense(), torch.zeros(2, 40))
    dense = quantise(torch.full((2, 64), -0.75), bits).dense()
    torch.testing.assert_close(dense, torch.full((2, 64), -0.75), atol=4e-4, rtol=0.0)


def test_what_is_rounded_already_stays() -> None:
    codes = torch.arange(-127, 128, 2, dtype=torch.int16).to(torch.int8).view(4, 32)
    codes[:, 0] = 127
    weight = QuantisedWeight(8, codes, torch.full((4, 1), 0.25))
    again = quantise(weight.dense(), 8)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.scales, weight.scales)


def test_values_of_codes() -> None:
    codes = torch.tensor([[0, 15, 8] + [1] * 31], dtype=torch.int8)
    scales, minima = torch.tensor([[2.0, 3.0]]), torch.tensor([[-1.0, 5.0]])
    assert QuantisedWeight(4, codes, scales).dense()[0, [0, 1, 2, 33]].tolist() == [-16.0, 14.0, 0.0, -21.0]
    assert QuantisedWeight(4, codes, scales, minima).dense()[0, [0, 1, 2, 33]].tolist() == [-1.0, 29.0, 15.0, 8.0]
    assert QuantisedWeight(8, codes, scales).dense()[0, [0, 1, 2, 33]].tolist() == [0.0, 30.0, 16.0, 3.0]
    halves = torch.tensor([[2.0, 4.0, 8.0]])
    assert QuantisedWeight(8, codes, halves, minima).dense()[0, [1, 15, 16, 33]].tolist() == [29.0, 1.0, 3.0, 13.0]


def test_stacked_outputs_follow_each_other() -> None:
    values = [random_values(size, 70, seed=size) for size in (3, 17, 1)]
    dense = [DenseWeight(each.bfloat16()) for each in values]
    assert torch.equal(stack_outputs(dense).dense(), torch.cat([each.dense() for each in dense]))
    for bits in (8, 4):
        rounded = [quantise(each, bits) for each in values]
        assert can_stack(rounded)
        assert torch.equal(stack_outputs(rounded).dense(), torch.cat([each.dense() for each in rounded]))
    wide = QuantisedWeight(8, rounded[0].codes, rounded[0].scales, has_wide_scales=True)
    stacked = stack_outputs([quantise(values[1], 8), wide])
    assert isinstance(stacked, QuantisedWeight)
    assert stacked.has_wide_scales


def test_formats_that_differ_do_not_stack() -> None:
    values = random_values(4, 64)
    eight, four = quantise(values, 8), quantise(values, 4)
    without_minima = QuantisedWeight(4, four.codes, four.scales)
    weights = [DenseWeight(values), DenseWeight(values.half()), eight, four, without_minima]
    for index, one in enumerate(weights):
        assert can_stack([one, one])
        assert not any(can_stack([one, other]) for other in weights[index + 1 :])
    assert [weight.format_name for weight in weights] == ["float32", "float16", "int8", "int4", "int4"]
