"""Native kernels against the reference, operation by operation, on every code path that runs here.

Tolerances are relative to what a sum is made of: an error of 1e-5 of the sum of its addends' magnitudes in float32; the
rounding of inputs to 8 bits, and of inputs and results to bfloat16 or float16 on top, which one executor may do and the
other not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from easyspec.model.row_layout import Segment, lay_out
from easyspec.ops.executor import Executor
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.native import NativeExecutor, NativeWeight
from easyspec.ops.native_library import CodePath
from easyspec.ops.program import (
    Accumulate,
    Activation,
    Embed,
    Gated,
    Norm,
    Product,
    ProgramWriter,
    Scale,
    Select,
)
from easyspec.ops.reference import ReferenceExecutor
from easyspec.ops.weights import DenseWeight, QuantisedWeight, Weight
from tests.ops.executors import Write, assert_close, plain_rows, random_tensor, run
from tests.ops.small_model import CPU, FORMATS, PATHS, weight_of

pytestmark = pytest.mark.skipif(not PATHS, reason="the library was not built")

# What a product may differ by, as a share of the sum of |input| * |weight|.
ROUNDING = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}


def product_tolerance(
    executor: NativeExecutor, x: torch.Tensor, weight: torch.Tensor, format_name: str
) -> torch.Tensor:
    """Of each output [T, O]."""
    magnitudes, rounding = x.abs(), ROUNDING.get(format_name)
    if rounding is None:  # every input of a group may be off by half a step of its largest one
        rounding = 1 / 126 if executor.name.endswith("-8bit") else 1 / 32_000
        padded = torch.nn.functional.pad(magnitudes, (0, -x.shape[1] % 32))
        largest = padded.view(len(x), -1, 32).amax(dim=-1)
        magnitudes = largest.repeat_interleave(32, dim=1)[:, : x.shape[1]] / 2
    return magnitudes @ weight.abs().T * rounding + 1e-4


def product_of(
    x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, before: torch.Tensor | None = None
) -> Write:
    """A program of one product, which is added to `before` if that is there."""

    def write(program: ProgramWriter, executor: Executor) -> Any:
        source, target = program.buffer(x.shape[1]), program.buffer(weight.shape[0])
        program.add(Product(source, target, executor.pack(weight), bias, adds=before is not None))
        return ({source: x} if before is None else {source: x, target: before}), [target]

    return write


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(16, 32), (1, 1), (90, 72), (101, 90), (33, 257), (640, 576)])
@pytest.mark.parametrize(("has_bias", "adds"), [(False, False), (True, True)])
def test_products(
    multiplying: NativeExecutor,
    reference: ReferenceExecutor,
    format_name: str,
    num_outputs: int,
    num_inputs: int,
    has_bias: bool,
    adds: bool,
) -> None:
    weight = weight_of(random_tensor(num_outputs, num_inputs), format_name)
    bias = random_tensor(num_outputs, seed=1) if has_bias else None
    for num_rows in (1, 5, 19):
        x = random_tensor(num_rows, num_inputs, seed=2)
        write = product_of(x, weight, bias, random_tensor(num_rows, num_outputs, seed=3) if adds else None)
        (actual,), (expected,) = (run(executor, write, plain_rows(num_rows)) for executor in (multiplying, reference))
        assert_close(actual, expected, product_tolerance(multiplying, x, weight.dense(), format_name))


@pytest.mark.parametrize("code", [-128, -127, 127])
def test_extreme_codes_do_not_overflow(multiplying: NativeExecutor, code: int) -> None:
    """Where all inputs are as large as all weights, sums are the largest there are: they must still be exact."""
    for bits, codes, num_scales in ((8, code, 10), (8, code, 20), (4, 15, 10)):
        weight = QuantisedWeight(bits, torch.full((33, 320), codes, dtype=torch.int8), torch.ones(33, num_scales))
        for sign in (1.0, -1.0):
            x = torch.full((3, 320), 127.0 * sign)
            (actual,) = run(multiplying, product_of(x, weight), plain_rows(3))
            assert torch.equal(actual, x @ weight.dense().T)


def test_products_side_by_side(multiplying: NativeExecutor, reference: ReferenceExecutor) -> None:
    """Queries, keys and values of formats that do not stack: each begins at its column and leaves the others alone."""
    formats = {48: "int8", 16: "int4", 21: "float32"}
    parts = [weight_of(random_tensor(size, 72, seed=size), name) for size, name in formats.items()]
    x = random_tensor(7, 72)

    def write(program: ProgramWriter, executor: Executor) -> Any:
        source, target = program.buffer(72), program.buffer(85)
        column = 0
        for part in parts:
            program.add(Product(source, target, executor.pack(part), column=column))
            column += part.shape[0]
        return {source: x}, [target]

    (actual,), (expected,) = (run(executor, write, plain_rows(7)) for executor in (multiplying, reference))
    tolerances = [product_tolerance(multiplying, x, part.dense(), part.format_name) for part in parts]
    assert_close(actual, expected, torch.cat(tolerances, dim=1))


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("format_names", [("float32", "float32"), ("int4", "int8"), ("bfloat16", "float16")])
def test_gated(
    multiplying: NativeExecutor, reference: ReferenceExecutor, activation: Activation, format_names: tuple[str, str]
) -> None:
    gate, up = (weight_of(random_tensor(90, 72, seed=seed), name) for seed, name in enumerate(format_names))
    x = random_tensor(9, 72, seed=5)
    biases = random_tensor(90, seed=6), random_tensor(90, seed=7)

    def write(program: ProgramWriter, executor: Executor) -> Any:
        source, target = program.buffer(72), program.buffer(90)
        program.add(Gated(source, target, executor.pack(gate), executor.pack(up), activation, *biases))
        return {source: x}, [target]

    (actual,), (expected,) = (run(executor, write, plain_rows(9)) for executor in (multiplying, reference))
    gates, ups = (x @ weight.dense().T + bias for weight, bias in zip((gate, up), biases, strict=True))
    named = zip((gate, up), format_names, strict=True)
    errors = [product_tolerance(multiplying, x, weight.dense(), name) for weight, name in named]
    # No slope of an activation is above 1.2, and none of its values above those of its input.
    assert_close(actual, expected, 1.2 * (errors[0] * (ups.abs() + errors[1]) + errors[1] * gates.abs()) + 1e-4)


@pytest.mark.parametrize("activation", Activation)
def test_activations_of_any_size(native: NativeExecutor, reference: ReferenceExecutor, activation: Activation) -> None:
    """From where they vanish to where they are their input."""
    x = torch.linspace(-120.0, 120.0, 4001)[:, None]
    one = DenseWeight(torch.ones(1, 1))

    def write(program: ProgramWriter, executor: Executor) -> Any:
        source, target, up = program.buffer(1), program.buffer(1), torch.ones(1)
        zero = executor.pack(DenseWeight(torch.zeros(1, 1)))
        program.add(Gated(source, target, executor.pack(one), zero, activation, None, up))
        return {source: x}, [target]

    (actual,), (expected,) = (run(executor, write, plain_rows(len(x))) for executor in (native, reference))
    assert_close(actual, expected, 2e-6 + 1e-6 * x.abs())


@pytest.mark.parametrize("size", [1, 16, 72, 90, 257, 1024])
def test_norms(native: NativeExecutor, reference: ReferenceExecutor, size: int) -> None:
    x, weight = random_tensor(11, size) * 3.0, random_tensor(size, seed=1)
    x[4] = 0.0

    def write(program: ProgramWriter, executor: Executor) -> Any:
        source, target = program.buffer(size), program.buffer(size)
        program.add(Norm(source, target, weight, 1e-5))
        return {source: x}, [target]

    (actual,), (expected,) = (run(executor, write, plain_rows(11)) for executor in (native, reference))
    assert_close(actual, expected, 2e-6 * expected.abs().clamp(min=1.0))


@pytest.mark.parametrize("format_name", FORMATS)
def test_embeddings(native: NativeExecutor, reference: ReferenceExecutor, format_name: str) -> None:
    table = weight_of(random_tensor(100, 90), format_name)

    def write(program: ProgramWriter, executor: Executor) -> Any:
        target = program.buffer(90)
        program.add(Embed(executor.pack(table), target, factor=3.0))
        return {}, [target]

    (actual,), (expected,) = (run(executor, write, plain_rows(40)) for executor in (native, reference))
    assert_close(actual, expected, 1e-6)


def test_sums_selections_and_scales(native: NativeExecutor, reference: ReferenceExecutor) -> None:
    """Sums are taken in order, may stand where they began, and need not all be kept; bits are the reference's."""
    values = [random_tensor(13, 90, seed=seed) for seed in range(4)]

    def write(program: ProgramWriter, executor: Executor) -> Any:
        start, *parts = (program.buffer(90) for _ in range(4))
        middle, last = program.buffer(90), program.buffer(90)
        selected = program.buffer(90, is_selected=True)
        program.add(
            Accumulate(start, tuple(parts), (None, middle, last)),
            Accumulate(start, (parts[0], parts[1]), (None, start)),
            Select(middle, selected),
            Scale(selected, 0.5, soft_cap=None),
        )
        return dict(zip((start, *parts), values, strict=True)), [start, middle, last, selected]

    rows = lay_out([Segment([0] * 13, range(13), range(1, 14), range(1, 14), np.arange(1, 14))]).select([12, 0, 12])
    actual, expected = (run(executor, write, rows) for executor in (native, reference))
    a, b, c, d = values
    for one, other, wanted in zip(actual, expected, (a + b + c, a + b + c, a + b + c + d, None), strict=True):
        assert torch.equal(one, other)
        assert wanted is None or torch.equal(one, wanted)
    assert torch.equal(actual[3], (a + b + c)[[12, 0, 12]] * 0.5)


def test_soft_caps(native: NativeExecutor, reference: ReferenceExecutor) -> None:
    x = random_tensor(5, 101) * 100.0

    def write(program: ProgramWriter, executor: Executor) -> Any:
        target = program.buffer(101)
        program.add(Scale(target, 0.7, soft_cap=30.0))
        return {target: x}, [target]

    (actual,), (expected,) = (run(executor, write, plain_rows(5)) for executor in (native, reference))
    assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize("format_name", [*FORMATS, "wide int4", "wide int8"])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(1, 1), (16, 32), (37, 71), (40, 64)])
def test_packing_keeps_every_weight(format_name: str, num_outputs: int, num_inputs: int) -> None:
    values = random_tensor(num_outputs, num_inputs)
    weight: Weight
    if format_name.startswith("wide"):  # scales that float16 does not hold
        rounded = weight_of(values, format_name.split()[1])
        assert isinstance(rounded, QuantisedWeight)
        minima = None if rounded.minima is None else rounded.minima * 1.0001
        weight = QuantisedWeight(rounded.bits, rounded.codes, rounded.scales * 1.0001, minima, has_wide_scales=True)
    else:
        weight = weight_of(values, format_name)
    packed = NativeWeight(weight)
    assert (packed.num_outputs, packed.num_inputs) == weight.shape
    dense = weight.dense()
    for index in range(num_outputs):
        assert torch.equal(packed.row(index), dense[index])


def test_packing_takes_every_code_and_any_strides() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(4, 64)
    weight = QuantisedWeight(8, codes, torch.ones(4, 2))
    assert torch.equal(torch.stack([NativeWeight(weight).row(index) for index in range(4)]), codes.float())
    whole = random_tensor(40, 30)
    for part in (whole[3:20, 5:17], whole.T, whole[:, ::2]):
        packed = NativeWeight(DenseWeight(part))
        assert torch.equal(torch.stack([packed.row(index) for index in range(len(part))]), part)


@pytest.mark.parametrize(
    ("format_name", "num_bytes"),
    [
        ("float32", 64 * 100 * 4),
        ("bfloat16", 64 * 100 * 2),
        ("int8", 64 * 128 * 1.0625),
        ("int8 by halves", 64 * 128 * 1.1875),
        ("int4", 64 * 128 * 0.625),
    ],
)
def test_weights_take_the_bytes_of_their_format(format_name: str, num_bytes: float) -> None:
    """Outputs are filled up to 16, inputs of integers to 32, which have two bytes of scale and of minimum each."""
    assert NativeWeight(weight_of(random_tensor(50, 100), format_name)).num_bytes == num_bytes


def test_executors_are_named_by_their_code_path() -> None:
    assert [NativeExecutor(1, path).name for path in PATHS] == [f"native-{path.name.lower()}" for path in PATHS]
    assert NativeExecutor(1, CodePath.PORTABLE, has_byte_inputs=True).name == "native-portable-8bit"


def test_the_environment_names_a_slower_code_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYSPEC_CODE_PATH", "portable")
    assert NativeExecutor(1).path is CodePath.PORTABLE
    monkeypatch.setenv("EASYSPEC_CODE_PATH", "abacus")
    with pytest.raises(ValueError, match="EASYSPEC_CODE_PATH is 'abacus'; allowed here: portable"):
        NativeExecutor(1)


def test_views_are_overwritten_by_the_next_program(native: NativeExecutor) -> None:
    """Programs of an executor share their memory: callers that keep a result copy it."""
    program = ProgramWriter()
    target = program.buffer(4)
    program.add(Scale(target, 2.0))
    compiled = native.compile(program)
    pool = KVPool(1, 1, 16, 0, torch.float32, CPU)
    (first,) = compiled.run(plain_rows(1), pool, {target: torch.ones(1, 4)}, [target])
    compiled.run(plain_rows(1), pool, {target: torch.zeros(1, 4)}, [target])
    assert not first.any()


def test_fewer_threads_give_the_same_bits() -> None:
    executor = NativeExecutor(3)
    writer = ProgramWriter()
    source, target = writer.buffer(64), writer.buffer(4096)
    writer.add(Product(source, target, executor.pack(DenseWeight(torch.randn(4096, 64)))))
    program = executor.compile(writer)
    pool = KVPool(1, 1, 16, 0, torch.float32, CPU)
    rows = torch.randn(5, 64)
    results = []
    for num_threads in (3, 1, 2, 3):
        executor.use_threads(num_threads)
        (result,) = program.run(plain_rows(5), pool, {source: rows}, [target])
        results.append(result.clone())
    assert all(torch.equal(result, results[0]) for result in results)


def test_rows_out_of_range_do_not_reach_the_library() -> None:
    """The library has no bounds of its own: a token beyond its table would read foreign memory."""
    executor = NativeExecutor(1)
    table = executor.pack(DenseWeight(torch.zeros(8, 16)))
    writer = ProgramWriter()
    output = writer.buffer(16)
    writer.add(Embed(table, output))
    program = executor.compile(writer)
    pool = KVPool(1, 1, 16, 2, torch.float32, torch.device("cpu"))
    for token_id in (8, -1):
        segment = Segment([token_id], [0], [0], [0], np.zeros(1, dtype=np.int64))
        with pytest.raises(AssertionError, match="token_ids are out of range"):
            program.run(lay_out([segment]).rows, pool)
