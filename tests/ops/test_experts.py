"""Mixtures of experts, and what else only some families compute: native kernels against the reference, bits of rows.

Tolerance: float32 sums in another order, 1e-5 of numbers around 1; inputs of integer weights are rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from easyspec.ops.executor import Executor
from easyspec.ops.program import (
    Activate,
    Activation,
    Buffer,
    Combine,
    Expert,
    ExpertGated,
    ExpertProduct,
    Gated,
    HeadShape,
    Norm,
    Product,
    ProgramWriter,
    Rotate,
    Route,
)
from easyspec.ops.weights import FP4_DOUBLED, QuantisedWeight
from tests.ops.executors import plain_rows, random_tensor, run
from tests.ops.small_model import CPU, EXECUTOR_NAMES, PATHS, KVPool, SmallModel, executor_of, weight_of

HIDDEN, INNER, NUM_EXPERTS, NUM_CHOSEN, NUM_ROWS = 72, 50, 7, 3, 11
Write = Callable[[ProgramWriter, Executor], tuple[dict[Buffer, torch.Tensor], list[Buffer]]]
NATIVE = [f"{path.name.lower()}" for path in PATHS]


def fp4_weight(num_outputs: int, num_inputs: int, seed: int = 0) -> QuantisedWeight:
    """Random codes, and powers of two of which some are beyond float16."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (num_outputs, num_inputs), generator=generator, dtype=torch.int8)
    exponents = torch.randint(-8, -3, (num_outputs, -(-num_inputs // 32)), generator=generator)
    exponents[0, 0] = -40
    scales = torch.ldexp(torch.ones(exponents.shape), exponents)
    return QuantisedWeight(4, codes, scales, has_wide_scales=True, is_fp4=True)


def packed(executor: Executor, num_outputs: int, num_inputs: int, format_name: str, seed: int) -> object:
    if format_name == "fp4":
        return executor.pack(fp4_weight(num_outputs, num_inputs, seed))
    values = random_tensor(num_outputs, num_inputs, seed=seed) * num_inputs**-0.5
    return executor.pack(weight_of(values, format_name))


def write_experts(
    values: torch.Tensor, format_name: str = "float32", *, is_normalised: bool = True, has_biases: bool = False
) -> Write:
    """A router and experts on `values` [T, E]; outputs are what they add, and the routes."""

    def write(program: ProgramWriter, executor: Executor) -> tuple[dict[Buffer, torch.Tensor], list[Buffer]]:
        hidden, normed, output = (program.buffer(HIDDEN) for _ in range(3))
        logits, routes = program.buffer(NUM_EXPERTS), program.buffer(2 * NUM_CHOSEN)
        inner, parts = (program.buffer(size, per_row=NUM_CHOSEN) for size in (INNER, HIDDEN))
        experts = tuple(
            Expert(
                *(
                    packed(executor, *shape, format_name, seed=10 * number + place)
                    for place, shape in enumerate(((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)))
                ),
                *(
                    random_tensor(size, seed=10 * number + place + 5) if has_biases else None
                    for place, size in enumerate((INNER, INNER, HIDDEN))
                ),
            )
            for number in range(NUM_EXPERTS)
        )
        router = packed(executor, NUM_EXPERTS, HIDDEN, "float32", seed=99)
        activation = Activation.CLAMPED_SWIGLU if has_biases else Activation.SILU
        program.add(
            Norm(hidden, normed, torch.ones(HIDDEN), 1e-6),
            Product(normed, logits, router),
            Route(logits, routes, NUM_CHOSEN, is_normalised),
            ExpertGated(normed, routes, inner, experts, activation),
            ExpertProduct(inner, routes, parts, experts),
            Combine(parts, routes, output, adds=False),
        )
        return {hidden: values}, [output, routes]

    return write


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("format_name", ["float32", "bfloat16", "int8", "int4", "fp4"])
@pytest.mark.parametrize("is_normalised", [True, False])
def test_experts_are_the_references(native: str, format_name: str, is_normalised: bool) -> None:
    write = write_experts(random_tensor(NUM_ROWS, HIDDEN), format_name, is_normalised=is_normalised)
    rows = plain_rows(NUM_ROWS)
    for num_threads in (1, 2):
        (actual, routes), (expected, their_routes) = (
            run(executor, write, rows) for executor in (executor_of(native, num_threads), executor_of("reference"))
        )
        torch.testing.assert_close(routes, their_routes, atol=1e-5, rtol=0.0)
        torch.testing.assert_close(actual, expected, atol=0.03 if format_name == "bfloat16" else 2e-3, rtol=0.0)
    shares = routes[:, NUM_CHOSEN:]
    assert torch.allclose(shares.sum(dim=1), torch.ones(NUM_ROWS), atol=1e-5) == is_normalised
    assert (shares.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("native", NATIVE)
def test_biases_and_the_clamped_gate(native: str) -> None:
    write = write_experts(9.0 * random_tensor(NUM_ROWS, HIDDEN), has_biases=True)
    actual, expected = (run(executor_of(name), write, plain_rows(NUM_ROWS))[0] for name in (native, "reference"))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
@pytest.mark.parametrize("format_name", ["float32", "bfloat16", "int4", "fp4"])
def test_a_rows_bits_are_its_own(name: str, format_name: str) -> None:
    """Alone, and among rows that choose the same experts or others."""
    values = random_tensor(NUM_ROWS, HIDDEN)
    executor = executor_of(name)
    together, routes = (x.clone() for x in run(executor, write_experts(values, format_name), plain_rows(NUM_ROWS)))
    assert len(routes[:, :NUM_CHOSEN].unique()) == NUM_EXPERTS
    for row in range(NUM_ROWS):
        alone, _ = run(executor, write_experts(values[row : row + 1], format_name), plain_rows(1))
        assert torch.equal(alone[0], together[row]), f"row {row}"


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_of_equal_experts_the_first_are_chosen(name: str) -> None:
    def write(program: ProgramWriter, executor: Executor) -> tuple[dict[Buffer, torch.Tensor], list[Buffer]]:
        logits, routes = program.buffer(5), program.buffer(4)
        program.add(Route(logits, routes, 2, is_normalised=True))
        return {logits: torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [3.0] * 5])}, [routes]

    (routes,) = run(executor_of(name), write, plain_rows(2))
    assert routes.tolist() == [[1.0, 2.0, 0.5, 0.5], [0.0, 1.0, 0.5, 0.5]]


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("num_rows", [1, 3, 20])
def test_fp4_products_are_those_of_its_numbers(name: str, num_rows: int) -> None:
    weight = fp4_weight(40, 96)
    assert torch.equal(weight.dense()[:, 0], torch.tensor(FP4_DOUBLED)[weight.codes[:, 0].long()] * weight.scales[:, 0])

    def write(program: ProgramWriter, executor: Executor) -> tuple[dict[Buffer, torch.Tensor], list[Buffer]]:
        source, output = program.buffer(96), program.buffer(40)
        program.add(Product(source, output, executor.pack(weight)))
        return {source: random_tensor(num_rows, 96)}, [output]

    (actual,) = run(executor_of(name), write, plain_rows(num_rows))
    torch.testing.assert_close(actual, random_tensor(num_rows, 96) @ weight.dense().T, atol=1e-3, rtol=0.0)


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
@pytest.mark.parametrize("width", [32, 45, 72])
def test_layer_norms_are_torchs(name: str, width: int) -> None:
    weight, bias = random_tensor(width, seed=1), random_tensor(width, seed=2)
    values = random_tensor(4, width) + 3.0

    def write(program: ProgramWriter, executor: Executor) -> tuple[dict[Buffer, torch.Tensor], list[Buffer]]:
        source, output = program.buffer(width), program.buffer(width)
        program.add(Norm(source, output, weight, 1e-5, bias, is_centred=True))
        return {source: values}, [output]

    (actual,) = run(executor_of(name), write, plain_rows(4))
    expected = torch.nn.functional.layer_norm(values, (width,), weight, bias, 1e-5)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_a_norm_of_some_columns_leaves_the_others(name: str) -> None:
    values, weight = random_tensor(3, 100), random_tensor(21, seed=1)

    def write(program: ProgramWriter, executor: Executor) -> tuple[dict[Buffer, torch.Tensor], list[Buffer]]:
        buffer = program.buffer(100)
        program.add(Norm(buffer, buffer, weight, 1e-5, column=40))
        return {buffer: values}, [buffer]

    (actual,) = run(executor_of(name), write, plain_rows(3))
    normed = torch.nn.functional.rms_norm(values[:, 40:61], (21,), weight, 1e-5)
    torch.testing.assert_close(actual, torch.cat([values[:, :40], normed, values[:, 61:]], dim=1), atol=1e-6, rtol=0.0)
    assert torch.equal(actual[:, :40], values[:, :40])
    assert torch.equal(actual[:, 61:], values[:, 61:])


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (Activation.SILU, torch.nn.functional.silu),
        (Activation.GELU_TANH, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_activations_without_a_gate(name: str, activation: Activation, function: Callable[..., torch.Tensor]) -> None:
    values = 3.0 * random_tensor(3, 50)

    def write(program: ProgramWriter, executor: Executor) -> tuple[dict[Buffer, torch.Tensor], list[Buffer]]:
        buffer = program.buffer(50)
        program.add(Activate(buffer, activation))
        return {buffer: values}, [buffer]

    (actual,) = run(executor_of(name), write, plain_rows(3))
    torch.testing.assert_close(actual, function(values), atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_the_clamped_gate_is_gpt_oss(name: str) -> None:
    values = 9.0 * random_tensor(4, 32)
    eye = weight_of(torch.eye(32), "float32")

    def write(program: ProgramWriter, executor: Executor) -> tuple[dict[Buffer, torch.Tensor], list[Buffer]]:
        source, output = program.buffer(32), program.buffer(32)
        weights = [executor.pack(eye) for _ in range(2)]
        program.add(Gated(source, output, *weights, Activation.CLAMPED_SWIGLU, torch.zeros(32), torch.ones(32)))
        return {source: values}, [output]

    (actual,) = run(executor_of(name), write, plain_rows(4))
    gate, up = values.clamp(max=7.0), (values + 1.0).clamp(-7.0, 7.0)
    torch.testing.assert_close(actual, (up + 1.0) * gate * torch.sigmoid(1.702 * gate), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_heads_are_turned_and_then_normed(name: str) -> None:
    heads = HeadShape(2, 1, 16)
    rotary, weight = SmallModel._rotary(20, 16), random_tensor(16, seed=4)
    values = random_tensor(3, heads.qkv_width)

    def write(program: ProgramWriter, executor: Executor) -> tuple[dict[Buffer, torch.Tensor], list[Buffer]]:
        qkv = program.buffer(heads.qkv_width)
        program.add(Rotate(qkv, 0, heads, rotary, 0.25, weight, weight, 1e-5, is_norm_last=True))
        return {qkv: values}, [qkv]

    pool = KVPool(1, 1, 16, 10, torch.float32, CPU)
    (actual,) = run(executor_of(name), write, plain_rows(3), pool)
    queries = values[:, :32].view(3, 2, 16)
    cosines, sines = (table[:3, None] for table in (rotary.cosines, rotary.sines))
    first, second = queries.chunk(2, dim=-1)
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    expected = 0.25 * torch.nn.functional.rms_norm(turned, (16,), weight, 1e-5)
    torch.testing.assert_close(actual[:, :32].view(3, 2, 16), expected, atol=1e-5, rtol=0.0)
