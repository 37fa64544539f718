"""From a checkpoint's tensors to packed weights of one computation type.

Dimensions: `O` outputs, `I` inputs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch

from easyspec.model.weights import TensorSource
from easyspec.ops.executor import Executor
from easyspec.ops.packed import PackedWeight
from easyspec.ops.weights import DenseWeight, Weight, quantise


class WeightFormat(enum.Enum):
    """How matrices are kept: as the checkpoint has them, or quantised when they are read."""

    AUTO = "auto"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def bits(self) -> int | None:
        return {WeightFormat.AUTO: None, WeightFormat.INT8: 8, WeightFormat.INT4: 4}[self]


class WeightReader:
    """Reads tensors for an executor. Dense matrices come in `dtype`, or quantised where `weights` says so."""

    def __init__(
        self, source: TensorSource, executor: Executor, dtype: torch.dtype, weights: WeightFormat = WeightFormat.AUTO
    ) -> None:
        self._source = source
        self._executor = executor
        self._dtype = dtype
        self._weights = weights
        self.pack: Callable[[Weight], PackedWeight] = executor.pack

    def weight(
        self, name: str, shape: tuple[int, int], rows: range | None = None, columns: range | None = None
    ) -> Weight:
        """The matrix `name` [O, I], or some of its rows or columns."""
        values = self._source.tensor(name, shape, rows, columns)
        bits = self._weights.bits
        return DenseWeight(values.to(self._dtype)) if bits is None else quantise(values, bits)

    def head(self, name: str, shape: tuple[int, int], rows: range | None = None) -> Weight:
        """A matrix of one row a token; it is never rounded to fewer than 8 bits."""
        values = self._source.tensor(name, shape, rows)
        return DenseWeight(values.to(self._dtype)) if self._weights.bits is None else quantise(values, 8)

    def vector(self, name: str, size: int, part: range | None = None) -> torch.Tensor:
        """A bias or the weight of a norm, float32."""
        return self._source.tensor(name, (size,), part).float().to(self._executor.device)
