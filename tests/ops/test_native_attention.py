"""Rotations, the KV cache and attention of native kernels against the reference, on every code path that runs here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from easyspec.errors import ConfigurationError
from easyspec.model.row_layout import Segment, lay_out
from easyspec.ops.executor import Executor
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.native import NativeExecutor
from easyspec.ops.native_library import CodePath
from easyspec.ops.program import (
    Attend,
    HeadShape,
    ProgramWriter,
    Rotary,
    Rotate,
)
from easyspec.ops.reference import ReferenceExecutor
from easyspec.ops.rows import PassRows
from tests.ops.executors import assert_close, plain_rows, random_tensor, run
from tests.ops.small_model import CPU, PATHS

pytestmark = pytest.mark.skipif(not PATHS, reason="the library was not built")

# Heads of every size that occurs, and some that do not.
HEAD_DIMS = (8, 20, 24, 64, 80, 96, 128, 256)
KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    paths: list[list[int]] = [[]]
    for node, parent in zip(nodes.tolist(), parents, strict=True):
        paths.append([*paths[parent], node])
    tree = Segment(
        [0] * 13,
        [length - 1 + len(path) for path in paths],
        [int(second[-1]), *nodes.tolist()],
        [length] * 13,
        second,
        paths,
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
