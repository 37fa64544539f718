"""The cost model's constants on this machine, each measured while all ranks do the same: they share cores and memory.

float32, one thread a rank. What a collective takes is measured as the service calls it (`easyspec.parallel.ranks`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.harness.random_weights import chain
from bench.ranks.passes import CPU, TINY, load, typical
from easyspec.model.row_layout import lay_out
from easyspec.ops.executor import choose_executor
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.program import Product, ProgramWriter
from easyspec.ops.weights import DenseWeight
from easyspec.parallel.ranks import Ranks

# Of a layer: norm, product, rotation, attention, product; norm, gated products, product.
ATTENTION_OPERATIONS, MLP_OPERATIONS = 5, 3
PART_BYTES = (64, 1024, 8192, 65_536, 524_288)
_SMALL_PART_BYTES = 8192
_WEIGHT = (1024, 2816)
_ROTATED_BYTES = 2**28  # so that weights come from memory as in a model
_FEW_ROWS, _MANY_ROWS = 4, 64
_REPEATS, _COLLECTIVES = 7, 20


@dataclass(frozen=True)
class Constants:
    """Means over ranks. `order_us` is rank 0's broadcast before a pass; `gather_us` is by bytes of a rank's part."""

    num_ranks: int
    memory_bytes_per_s: float
    flops_per_s: float
    op_us: float
    collective_us: float
    link_bytes_per_s: float
    order_us: float
    gather_us: dict[int, float]


def measure_constants(ranks: Ranks, folder: Path) -> Constants:
    """Called by every rank at the same time, the same result on each; `folder` is for a configuration."""
    weight_bytes = 4 * _WEIGHT[0] * _WEIGHT[1]
    products = _products(_ROTATED_BYTES // weight_bytes)
    few_rows_s = _together(ranks, lambda: _run_all(products, _FEW_ROWS)) / len(products)
    many_rows_s = _together(ranks, lambda: _run_all(products, _MANY_ROWS)) / len(products)
    gather_us, order_us = {}, 0.0
    if ranks.size > 1:
        for num_bytes in PART_BYTES:
            gather_us[num_bytes] = _each_us(ranks, products, partial(ranks.gather, torch.zeros(num_bytes // 4)))
        payload = b"order" if ranks.rank == 0 else None
        order_us = _each_us(ranks, products, lambda: ranks.share(payload))
    # Latency of a decode step's sizes, and bytes per second over the slope from them to the largest part.
    latency_us, link = 0.0, 1.0
    if gather_us:
        large = max(gather_us)
        latency_us = statistics.median(us for num_bytes, us in gather_us.items() if num_bytes <= _SMALL_PART_BYTES)
        link = 1e6 * (ranks.size - 1) * large / max(gather_us[large] - latency_us, 1e-3)
    # Arithmetic takes no time: what remains is the cost of operations.
    tiny_pass = partial(load(folder, TINY).run, num_rows=4, context_tokens=64)
    return Constants(
        num_ranks=ranks.size,
        memory_bytes_per_s=weight_bytes / few_rows_s,
        flops_per_s=2 * _MANY_ROWS * _WEIGHT[0] * _WEIGHT[1] / many_rows_s,
        op_us=1e6 * _together(ranks, tiny_pass) / (TINY.num_layers * (ATTENTION_OPERATIONS + MLP_OPERATIONS)),
        collective_us=latency_us,
        link_bytes_per_s=link,
        order_us=order_us,
        gather_us=gather_us,
    )


Run = Callable[[int], object]  # of so many rows


def _products(count: int) -> list[Run]:
    """Products, each by weights of its own and a program of its own."""
    executor, pool = choose_executor("auto", CPU, num_threads=1), KVPool(1, 1, 16, 0, torch.float32, CPU)
    rows = {num_rows: lay_out([chain(num_rows, 0)]).rows for num_rows in (_FEW_ROWS, _MANY_ROWS)}

    def prepared() -> Run:
        program = ProgramWriter()
        source, target = program.buffer(_WEIGHT[1]), program.buffer(_WEIGHT[0])
        program.add(Product(source, target, executor.pack(DenseWeight(torch.randn(*_WEIGHT)))))
        compiled = executor.compile(program)
        return lambda num_rows: compiled.run(rows[num_rows], pool)

    return [prepared() for _ in range(count)]


def _run_all(products: list[Run], num_rows: int) -> None:
    for product in products:
        product(num_rows)


def _each_us(ranks: Ranks, products: list[Run], collective: Callable[[], object]) -> float:
    """Microseconds that a collective adds to a product before it, as in a pass: ranks come late and have to wake up."""
    some = products[:_COLLECTIVES]

    def with_collectives() -> None:
        for product in some:
            product(_FEW_ROWS)
            collective()

    alone_s = _together(ranks, lambda: _run_all(some, _FEW_ROWS))
    return 1e6 * (_together(ranks, with_collectives) - alone_s) / len(some)


def _together(ranks: Ranks, work: Callable[[], object]) -> float:
    """Seconds that `work` takes: lower quartile of repeats, mean over the ranks, which all do it at once."""
    work()
    times = []
    for _ in range(_REPEATS):
        ranks.gather(torch.zeros(1))
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    own = torch.tensor(typical(times), dtype=torch.float64)
    return float(ranks.gather(own).mean())
