"""Matrix products with weights, prepacked where the CPU has a kernel for it.

Dimensions: `T` rows, `I` inputs, `O` outputs, `N` layers in a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

# Rows of one product when products of different row counts were found to differ in their last bits.
FALLBACK_TILE_ROWS = 16


# Below this many weights a prepacked product is no faster (docs/benchmarks/kernels.txt).
_MIN_PACKED_WEIGHTS = 2**19


class Linear:
    """`x @ weight.T + bias` for `weight` [O, I].

    A large weight is prepacked into the kernel's own blocking where the CPU's oneDNN can do it for the type:
    up to three times the speed of the plain kernel at 4 to 32 rows, and a row's result does not depend on
    how many other rows there are. `tile_rows` cuts the input into products of exactly that many rows,
    which restores this property where a kernel lacks it (`is_row_invariant` tells).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.tile_rows: int | None = None
        self._device, self._dtype = weight.device, weight.dtype
        self._multiply = _packed_product(weight, bias) or (lambda x: functional.linear(x, weight, bias))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, I] -> [T, O]."""
        if self.tile_rows is None:
            return self._multiply(x)
        num_rows, tile = x.shape[0], self.tile_rows
        padded = functional.pad(x, (0, 0, 0, -num_rows % tile))
        return torch.cat([self._multiply(rows) for rows in torch.split(padded, tile)])[:num_rows]

    def is_row_invariant(self, row_counts: tuple[int, ...]) -> bool:
        """True if a row's bits are the same in products of each of `row_counts` rows."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(max(row_counts), self.in_features, generator=generator)
        rows = rows.to(device=self._device, dtype=self._dtype)
        whole = self(rows)
        return all(torch.equal(self(rows[:count]), whole[:count]) for count in row_counts)


def _packed_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """oneDNN's product with a prepacked copy of `weight`, or None where it has no kernel."""
    has_onednn = torch.backends.mkldnn.is_available()
    if weight.device.type != "cpu" or not has_onednn or weight.numel() < _MIN_PACKED_WEIGHTS:
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    except RuntimeError:  # this type needs CPU instructions that are not there
        return None
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, bias, "none", [], "")
