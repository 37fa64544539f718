"""Native kernels against the reference, operation by operation, on every code path that runs here.

Tolerances are relative to what a sum is made of: an error of 1e-5 of the sum of its addends' magnitudes in float32; the
rounding of inputs to 8 bits, and of inputs and results to bfloat16 or float16 on top, which one executor may do and the
other not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from easyspec.errors import ConfigurationError
from easyspec.model.row_layout import Segment, TreeColumns, lay_out
from easyspec.ops.executor import Executor
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.native import NativeExecutor, NativeWeight
from easyspec.ops.native_library import CodePath
from easyspec.ops.program import (
    Accumulate,
    Activation,
    Attend,
    Buffer,
    Embed,
    Gated,
    HeadShape,
    Norm,
    Product,
    ProgramWriter,
    Rotary,
    Rotate,
    Scale,
    Select,
)
from easyspec.ops.reference import ReferenceExecutor
from easyspec.ops.rows import PassRows
from easyspec.ops.weights import DenseWeight, QuantisedWeight, Weight
from tests.ops.small_model import CPU, FORMATS, PATHS, weight_of

pytestmark = pytest.mark.skipif(not PATHS, reason="the library was not built")

# What a product may differ by, as a share of the sum of |input| * |weight|; of a group's largest input for 8 bits.
ROUNDING = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10, "int8": 1 / 120, "int4": 1 / 120}
# Heads of every size that occurs, and some that do not.
HEAD_DIMS = (8, 20, 24, 64, 80, 96, 128, 256)
KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Write = Callable[[ProgramWriter, Executor], tuple[dict[Buffer, torch.Tensor], list[Buffer]]]


@pytest.fixture(params=[f"{path.name.lower()} {num_threads}" for path in PATHS for num_threads in (1, 2)])
def native(request: pytest.FixtureRequest) -> NativeExecutor:
    path, num_threads = request.param.split()
    return NativeExecutor(int(num_threads), CodePath[path.upper()])


@pytest.fixture
def reference() -> ReferenceExecutor:
    return ReferenceExecutor(CPU)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_rows(num_rows: int, vocab_size: int = 100) -> PassRows:
    """A text from its beginning."""
    slots = np.arange(1, num_rows + 1)
    token_ids = [7 * row % vocab_size for row in range(num_rows)]
    segment = Segment(token_ids, range(num_rows), slots.tolist(), range(1, num_rows + 1), slots)
    return lay_out([segment]).rows


def run(executor: Executor, write: Write, rows: PassRows, pool: KVPool | None = None) -> list[torch.Tensor]:
    """The outputs of a program that `write` writes."""
    program = ProgramWriter()
    inputs, outputs = write(program, executor)
    pool = pool or KVPool(1, 1, 16, 0, torch.float32, CPU)
    return [output.clone() for output in executor.compile(program).run(rows, pool, inputs, outputs)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor | float) -> None:
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    excess = (actual - expected).abs() - tolerance
    assert (excess <= 0).all(), f"{float(excess.max()):.3g} beyond the tolerance"


def product_tolerance(x: torch.Tensor, weight: torch.Tensor, format_name: str) -> torch.Tensor:
    """Of each output [T, O]."""
    magnitudes = x.abs()
    if format_name.startswith("int"):  # every input of a group may be off by half a step of its largest one
        padded = torch.nn.functional.pad(magnitudes, (0, -x.shape[1] % 32))
        largest = padded.view(len(x), -1, 32).amax(dim=-1)
        magnitudes = largest.repeat_interleave(32, dim=1)[:, : x.shape[1]] / 2
    return magnitudes @ weight.abs().T * ROUNDING[format_name.split()[0]] + 1e-6


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
    native: NativeExecutor,
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
        (actual,), (expected,) = (run(executor, write, plain_rows(num_rows)) for executor in (native, reference))
        assert_close(actual, expected, product_tolerance(x, weight.dense(), format_name))


@pytest.mark.parametrize("code", [-128, -127, 127])
def test_extreme_codes_do_not_overflow(native: NativeExecutor, code: int) -> None:
    """Where all inputs are as large as all weights, sums are the largest there are: they must still be exact."""
    for bits, codes, num_scales in ((8, code, 10), (8, code, 20), (4, 15, 10)):
        weight = QuantisedWeight(bits, torch.full((33, 320), codes, dtype=torch.int8), torch.ones(33, num_scales))
        for sign in (1.0, -1.0):
            x = torch.full((3, 320), 127.0 * sign)
            (actual,) = run(native, product_of(x, weight), plain_rows(3))
            assert torch.equal(actual, x @ weight.dense().T)


def test_products_side_by_side(native: NativeExecutor, reference: ReferenceExecutor) -> None:
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

    (actual,), (expected,) = (run(executor, write, plain_rows(7)) for executor in (native, reference))
    tolerances = [product_tolerance(x, part.dense(), part.format_name) for part in parts]
    assert_close(actual, expected, torch.cat(tolerances, dim=1))


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("format_names", [("float32", "float32"), ("int4", "int8"), ("bfloat16", "float16")])
def test_gated(
    native: NativeExecutor, reference: ReferenceExecutor, activation: Activation, format_names: tuple[str, str]
) -> None:
    gate, up = (weight_of(random_tensor(90, 72, seed=seed), name) for seed, name in enumerate(format_names))
    x = random_tensor(9, 72, seed=5)
    biases = random_tensor(90, seed=6), random_tensor(90, seed=7)

    def write(program: ProgramWriter, executor: Executor) -> Any:
        source, target = program.buffer(72), program.buffer(90)
        program.add(Gated(source, target, executor.pack(gate), executor.pack(up), activation, *biases))
        return {source: x}, [target]

    (actual,), (expected,) = (run(executor, write, plain_rows(9)) for executor in (native, reference))
    gates, ups = (x @ weight.dense().T + bias for weight, bias in zip((gate, up), biases, strict=True))
    errors = [product_tolerance(x, weight.dense(), name) for weight, name in zip((gate, up), format_names, strict=True)]
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


def rotary(rotary_dim: int, num_positions: int = 700) -> Rotary:
    frequencies = 100.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.arange(num_positions)[:, None] * frequencies[None]
    return Rotary(angles.cos(), angles.sin())


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("share", "has_norms"), [(1.0, False), (0.5, True), (0.0, True)])
def test_rotations_and_the_cache(
    native: NativeExecutor,
    reference: ReferenceExecutor,
    head_dim: int,
    dtype: torch.dtype,
    share: float,
    has_norms: bool,
) -> None:
    """Keys and values of the right layer, heads and slots alone are written, rounded to the pool's type."""
    heads, num_rows = HeadShape(4, 2, head_dim), 6
    qkv = random_tensor(num_rows, heads.qkv_width)
    norms = [random_tensor(head_dim, seed=seed) for seed in (1, 2)] if has_norms else [None, None]
    turned = int(head_dim * share) // 2 * 2

    def write(program: ProgramWriter, executor: Executor) -> Any:
        source = program.buffer(heads.qkv_width)
        program.add(Rotate(source, 1, heads, rotary(turned) if turned else None, 0.3, *norms, 1e-5))
        return {source: qkv}, [source]

    pools = [KVPool(3, 2, head_dim, 20, dtype, CPU) for _ in range(2)]
    slots = [4, 9, 2, 17, 11, 20]
    segment = Segment([0] * num_rows, range(5, 11), slots, range(1, 7), np.array(slots))
    rows = lay_out([segment]).rows
    results = [run(executor, write, rows, pool)[0] for executor, pool in zip((native, reference), pools, strict=True)]
    num_queries = heads.num_heads * head_dim
    assert_close(results[0][:, :num_queries], results[1][:, :num_queries], 1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 0.04 if dtype == torch.bfloat16 else 0.005
    for name in ("keys", "values"):
        one, other = (getattr(pool, name).float().clone() for pool in pools)
        assert_close(one, other, tolerance)
        one[1, :, slots] = 0.0
        assert not one.any()
    if dtype == torch.float32 and not has_norms:
        values = qkv[:, -2 * head_dim :].view(num_rows, 2, head_dim).transpose(0, 1)
        assert torch.equal(pools[0].values[1, :, slots, :head_dim], values)


def tree_and_text(length: int) -> PassRows:
    """A prompt's last 30 rows, a tree of 12 nodes behind another text, and a single row."""
    generator = np.random.default_rng(length)
    slots = generator.permutation(np.arange(1, 2000))
    first, second, third, nodes = slots[:length], slots[800 : 800 + length], slots[1500:1503], slots[1600:1612]
    prompt = range(max(0, length - 30), length)
    text = Segment([0] * len(prompt), prompt, first[prompt].tolist(), [p + 1 for p in prompt], first)
    parents = [int(generator.integers(0, node + 1)) for node in range(12)]
    visible = np.zeros((13, 12), dtype=np.bool_)
    for node, parent in enumerate(parents):
        visible[node + 1] = visible[parent]
        visible[node + 1, node] = True
    depths = visible.sum(axis=1)
    tree = Segment(
        [0] * 13,
        [length - 1 + int(depth) for depth in depths],
        [int(second[-1]), *nodes.tolist()],
        [length] * 13,
        second,
        TreeColumns(nodes.tolist(), [length - 1 + int(depth) for depth in depths[1:]], visible),
    )
    alone = Segment([0], [2], third[2:].tolist(), [3], third)
    return lay_out([text, tree, alone]).rows


ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 40},
    "window of one": {"window": 1},
    "wide window": {"window": 270},
    "soft cap": {"soft_cap": 2.0},
    "sinks": {"sinks": torch.tensor([-1.0, 0.5, 3.0, 9.0, -20.0, 40.0])},
}


def attended(
    executor: Executor, heads: HeadShape, dtype: torch.dtype, rows: PassRows, options: dict[str, Any]
) -> torch.Tensor:
    pool = KVPool(1, heads.num_kv_heads, heads.head_dim, 2000, dtype, CPU)
    for seed, plane in enumerate((pool.keys, pool.values)):
        plane[..., : heads.head_dim] = random_tensor(*plane.shape, seed=seed)[..., : heads.head_dim].to(dtype)
    qkv = random_tensor(len(rows), heads.qkv_width, seed=3) * heads.head_dim**-0.5

    def write(program: ProgramWriter, executor: Executor) -> Any:
        source, target = program.buffer(heads.qkv_width), program.buffer(heads.num_heads * heads.head_dim)
        program.add(Attend(source, target, 0, heads, **options))
        return {source: qkv}, [target]

    return run(executor, write, rows, pool)[0]


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("length", [1, 17, 255, 257, 700])
def test_attention(native: NativeExecutor, reference: ReferenceExecutor, kind: str, length: int) -> None:
    rows = tree_and_text(length)
    for dtype in KV_DTYPES:
        actual, expected = (
            attended(executor, HeadShape(6, 2, 24), dtype, rows, ATTENTION[kind]) for executor in (native, reference)
        )
        assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_attention_of_heads_of_any_size(
    native: NativeExecutor, reference: ReferenceExecutor, head_dim: int, num_kv_heads: int
) -> None:
    rows, heads = tree_and_text(270), HeadShape(6, num_kv_heads, head_dim)
    actual, expected = (attended(executor, heads, torch.float32, rows, {}) for executor in (native, reference))
    assert_close(actual, expected, 2e-5)


def test_attention_of_many_heads_of_one_key(native: NativeExecutor, reference: ReferenceExecutor) -> None:
    rows, heads = tree_and_text(270), HeadShape(64, 1, 16)
    actual, expected = (attended(executor, heads, torch.float32, rows, {}) for executor in (native, reference))
    assert_close(actual, expected, 2e-5)


@pytest.mark.parametrize("heads", [HeadShape(65, 1, 16), HeadShape(2, 2, 520)])
def test_heads_beyond_the_kernels_are_refused(native: NativeExecutor, heads: HeadShape) -> None:
    with pytest.raises(ConfigurationError, match="allowed for this model: reference"):
        attended(native, heads, torch.float32, plain_rows(1), {})


@pytest.mark.parametrize("path", PATHS)
def test_windows_that_begin_anywhere(path: CodePath, reference: ReferenceExecutor) -> None:
    """At every place of a vector and of a group of keys, for a row alone."""
    executor = NativeExecutor(1, path)
    heads = HeadShape(2, 1, 16)
    for length in range(30, 62):
        slots = np.arange(1, length + 1)
        rows = lay_out([Segment([0], [length - 1], [length], [length], slots)]).rows
        actual, expected = (attended(e, heads, torch.float32, rows, {"window": 29}) for e in (executor, reference))
        assert_close(actual, expected, 2e-5)


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
