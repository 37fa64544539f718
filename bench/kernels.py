"""`python -m bench.kernels`: what decisions 0003 and 0004 rest on, measured on this machine.

Which row counts give a row the same bits, up to which width a sum ignores zeros put between its terms, and what a
product costs by rows, plain and prepacked. float32, random weights, default shapes of the bundled and the bench base.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional

from bench.machine import describe_machine

_ROW_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 32, 64, 128, 512)
_TIMED_ROWS = (1, 4, 8, 16, 32)
_SHAPES = ((320, 160), (864, 160), (4096, 160), (1920, 960), (5184, 960), (960, 2592))
_WIDTHS = (64, 128, 192, 256, 384)
_HEAD_DIM = 40
_ROUNDS = 9
# Weights of one shape that are rotated through, so that they come from memory as in a model.
_ROTATED_BYTES = 2**28

Product = Callable[[torch.Tensor], torch.Tensor]


def products(weight: torch.Tensor) -> dict[str, Product]:
    """`x @ weight.T` by each kernel there is here."""
    found: dict[str, Product] = {"plain": lambda x: functional.linear(x, weight)}
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    except RuntimeError:
        return found
    found["prepacked"] = lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return found


def differing_share(product: Product, rows: torch.Tensor) -> dict[int, float]:
    """For each row count, the share of elements whose bits differ from those of the product of all `rows`."""
    whole = product(rows)
    return {count: float((product(rows[:count]) != whole[:count]).float().mean()) for count in _ROW_COUNTS}


def ignores_zeros(width: int) -> bool:
    """Whether a batched product of `width` columns gives the same bits wherever its zero weights stand."""
    count = width // 2
    weights, values = torch.rand(2, 8, count), torch.randn(2, count, _HEAD_DIM + 1)
    results = []
    for places in (torch.arange(count), *(torch.randperm(width)[:count].sort().values for _ in range(_ROUNDS))):
        spread_weights, spread_values = torch.zeros(2, 8, width), torch.randn(2, width, _HEAD_DIM + 1)
        spread_weights[..., places] = weights
        spread_values[:, places] = values
        results.append(torch.bmm(spread_weights, spread_values))
    return all(torch.equal(result, results[0]) for result in results)


def milliseconds(shape: tuple[int, int], kernel: str, num_rows: int) -> float:
    """Median time of one product whose weights come from memory."""
    num_copies = max(2, _ROTATED_BYTES // (4 * shape[0] * shape[1]))
    kernels = [products(torch.randn(shape))[kernel] for _ in range(min(num_copies, 64))]
    rows = torch.randn(num_rows, shape[1])
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for product in kernels:
            product(rows)
        times.append((time.perf_counter() - started) / len(kernels))
    return 1e3 * statistics.median(times)


def main(argv: Sequence[str]) -> int:
    """Print the three tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="row invariance and cost of products")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{describe_machine()}, {arguments.threads} threads")
    print("\nshare of elements that differ from the product of 512 rows, by rows (others: none)")
    for shape in _SHAPES:
        for kernel, product in products(torch.randn(shape)).items():
            shares = differing_share(product, torch.randn(max(_ROW_COUNTS), shape[1]))
            shown = ", ".join(f"{count}: {share:.0%}" for count, share in shares.items() if share > 0)
            print(f"  {shape[0]:5} x {shape[1]:<5} {kernel:9} {shown or 'none at any row count'}")
    print("\nzeros between the terms of a sum change nothing, by width")
    print("  " + ", ".join(f"{width}: {'yes' if ignores_zeros(width) else 'no'}" for width in _WIDTHS))
    print(f"\nms a product, by rows {_TIMED_ROWS}")
    for shape in _SHAPES:
        for kernel in products(torch.randn(shape)):
            times = "  ".join(f"{milliseconds(shape, kernel, rows):6.3f}" for rows in _TIMED_ROWS)
            print(f"  {shape[0]:5} x {shape[1]:<5} {kernel:9} {times}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
