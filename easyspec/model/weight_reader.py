"""From a checkpoint's tensors to packed weights of one computation type.

Dimensions: `O` outputs, `I` inputs.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch

from easyspec.model.quantised_blocks import quantised_weight
from easyspec.model.weights import TensorSource
from easyspec.ops.executor import Executor
from easyspec.ops.packed import PackedWeight
from easyspec.ops.weights import DenseWeight, QuantisedWeight, Weight, quantise


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
        if self._weights.bits is not None:
            return quantise(self._source.tensor(name, shape, rows, columns), self._weights.bits)
        stored = self._stored(name, shape, rows, columns)
        return stored or DenseWeight(self._source.tensor(name, shape, rows, columns).to(self._dtype))

    def head(self, name: str, shape: tuple[int, int], rows: range | None = None) -> Weight:
        """A matrix of one row a token; it is never rounded to fewer than 8 bits."""
        if self._weights.bits is not None:
            return quantise(self._source.tensor(name, shape, rows), 8)
        return self._stored(name, shape, rows) or DenseWeight(self._source.tensor(name, shape, rows).to(self._dtype))

    def _stored(
        self, name: str, shape: tuple[int, int], rows: range | None, columns: range | None = None
    ) -> QuantisedWeight | None:
        """The matrix as a quantised checkpoint stores it, where executors can compute with that."""
        stored = self._source.blocks(name, shape, rows)
        weight = None if stored is None else quantised_weight(stored)
        return weight if weight is None or columns is None else weight.columns(columns)

    def vector(self, name: str, size: int, part: range | None = None) -> torch.Tensor:
        """A bias or the weight of a norm, float32."""
        return self._source.tensor(name, (size,), part).float().to(self._executor.device)
