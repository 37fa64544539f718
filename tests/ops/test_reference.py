"""The reference against formulas written out anew, and collectives as an executor runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from easyspec.model.row_layout import lay_out
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.program import (
    Attend,
    Buffer,
    GatherFromRanks,
    HeadShape,
    Product,
    ProgramWriter,
    Rotary,
    Rotate,
    SumOverRanks,
)
from easyspec.ops.reference import ReferenceExecutor, unit_rms
from easyspec.ops.rows import PassRows
from easyspec.ops.weights import DenseWeight
from easyspec.parallel.ranks import SingleRank
from tests.model.test_row_layout import chain
from tests.ops.small_model import CPU, EXECUTOR_NAMES, executor_of

HEADS = HeadShape(4, 2, 8)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_after(start: int, count: int) -> PassRows:
    return lay_out([chain(start, count, first_slot=1)]).rows


def test_products_round_their_inputs_to_the_weights_type() -> None:
    x, weight = random_tensor(21, 40), random_tensor(7, 40, seed=1).bfloat16()
    program = ProgramWriter()
    source, target = program.buffer(40), program.buffer(7)
    executor = ReferenceExecutor(CPU)
    program.add(Product(source, target, executor.pack(DenseWeight(weight))))
    pool = KVPool(1, 1, 16, 0, torch.float32, CPU)
    (result,) = executor.compile(program).run(rows_after(0, 21), pool, {source: x}, [target])
    expected = x.bfloat16().double() @ weight.double().T
    torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=2e-2)


def written_out(qkv: torch.Tensor, start: int, pool: KVPool, window: int, cap: float, sinks: torch.Tensor) -> list[Any]:
    """Attention of every row and head by a loop over positions."""
    results = []
    for row in range(len(qkv)):
        length = start + row + 1
        for head in range(HEADS.num_heads):
            query, kv_head = qkv[row, head * 8 : head * 8 + 8].double(), head // 2
            weights, total = [], math.exp(float(sinks[head]))
            for position in range(max(0, length - window), length):
                key = pool.keys[0, kv_head, 1 + position, :8].double()
                weights.append((position, math.exp(cap * math.tanh(float(query @ key) / cap))))
                total += weights[-1][1]
            values = (weight / total * pool.values[0, kv_head, 1 + p, :8].double() for p, weight in weights)
            results.append(sum(values, torch.zeros(8, dtype=torch.float64)))
    return results


def test_attention_is_the_formula() -> None:
    pool = KVPool(1, 2, 8, 60, torch.float32, CPU)
    for seed, plane in enumerate((pool.keys, pool.values)):
        plane[..., :8] = random_tensor(*plane.shape, seed=seed)[..., :8]
    qkv, sinks = random_tensor(3, HEADS.qkv_width, seed=3), random_tensor(4, seed=4)
    program = ProgramWriter()
    source, target = program.buffer(HEADS.qkv_width), program.buffer(32)
    program.add(Attend(source, target, 0, HEADS, window=9, soft_cap=1.5, sinks=sinks))
    (result,) = ReferenceExecutor(CPU).compile(program).run(rows_after(10, 3), pool, {source: qkv}, [target])
    expected = torch.stack(written_out(qkv, 10, pool, 9, 1.5, sinks)).view(3, 32)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_rotation_is_a_turn_of_complex_numbers() -> None:
    """Dimension i with dimension i + rotary_dim / 2; what lies behind them stays, and queries are scaled."""
    angles = torch.arange(30.0)[:, None] * torch.tensor([1.0, 0.1])[None]
    qkv, norm = random_tensor(3, HEADS.qkv_width), random_tensor(8, seed=1)
    pool = KVPool(1, 2, 8, 30, torch.float32, CPU)
    program = ProgramWriter()
    source = program.buffer(HEADS.qkv_width)
    program.add(Rotate(source, 0, HEADS, Rotary(angles.cos(), angles.sin()), 0.5, norm, norm, 1e-6))
    (result,) = ReferenceExecutor(CPU).compile(program).run(rows_after(4, 3), pool, {source: qkv}, [source])
    heads = qkv.view(3, 8, 8)
    normed = unit_rms(heads, 1e-6) * norm
    turned = torch.complex(normed[..., :2], normed[..., 2:4]) * torch.exp(1j * angles[4:7])[:, None]
    expected = torch.cat([turned.real, turned.imag, normed[..., 4:]], dim=-1)
    torch.testing.assert_close(result.view(3, 8, 8)[:, :4], 0.5 * expected[:, :4])
    torch.testing.assert_close(pool.keys[0, :, 5:8, :8].transpose(0, 1), expected[:, 4:6])
    assert torch.equal(pool.values[0, :, 5:8, :8].transpose(0, 1), heads[:, 6:])


class TwoRanks(SingleRank):
    """Rank 0 of two, the other of which has ten times its numbers."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 10 * tensor

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor, 10 * tensor])


@pytest.mark.parametrize("name", EXECUTOR_NAMES)
def test_collectives(name: str) -> None:
    program, executor = ProgramWriter(), executor_of(name)
    a, b, third = (program.buffer(40) for _ in range(3))
    x, y = random_tensor(5, 40), random_tensor(5, 40, seed=1)

    def result(step: SumOverRanks | GatherFromRanks, wanted: list[Buffer]) -> list[torch.Tensor]:
        program.steps.clear()
        program.add(step)
        pool = KVPool(1, 1, 16, 0, torch.float32, CPU)
        run: Callable[..., list[torch.Tensor]] = executor.compile(program, TwoRanks()).run
        return [each.clone() for each in run(rows_after(0, 5), pool, {a: x, b: y}, wanted)]

    first, second = result(SumOverRanks((a, b)), [a, b])
    assert torch.equal(first, x + 10 * x)
    assert torch.equal(second, y + 10 * y)
    assert not result(SumOverRanks((a,), is_part=False), [a])[0].any()
    gathered = result(GatherFromRanks((a, b), (a, b, third)), [a, b, third])
    for actual, expected in zip(gathered, (x, y, 10 * x), strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(result(GatherFromRanks((a, None), (a, b, third)), [b, third])[1], 10 * x)
