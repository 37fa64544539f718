"""What every way of quantizing weights comes to: codes with scales and zeros, or numbers of eight bits with scales.

Dimensions: `R` rows and `C` columns of a matrix, `G` groups of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from easyspec.model.stored_blocks import StoredBlocks


class StoredTensors(Protocol):
    """The tensors of a checkpoint as they are stored."""

    def __contains__(self, name: str) -> bool: ...
    def stored(self, name: str) -> torch.Tensor:
        """A whole tensor in its stored type; raises ConfigurationError if it is missing."""


@dataclass(frozen=True)
class GroupedWeight:
    """A matrix whose value is scale * (code - zero).

    codes: uint8 [R, C] of `num_bits`; scales: float32 [R, G]; zeros: float32 [R, G], whole numbers. Columns come in
    groups one after the other, unless `group_of_column` (int64 [C]) says otherwise.
    """

    num_bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group_of_column: torch.Tensor | None = None

    def values(self) -> torch.Tensor:
        """float32 [R, C], each rounded once."""
        groups = self.group_of_column
        if groups is None:
            size = self.codes.shape[1] // self.scales.shape[1]
            groups = torch.arange(self.codes.shape[1]) // size
        return (self.codes.float() - self.zeros[:, groups]) * self.scales[:, groups]

    def blocks(self) -> StoredBlocks:
        parts = {"codes": self.codes.numpy(), "scales": self.scales.numpy(), "zeros": self.zeros.numpy()}
        if self.group_of_column is not None:
            parts["group_of_column"] = self.group_of_column.numpy()
        return StoredBlocks(f"uint{self.num_bits}", tuple(self.codes.shape), parts)


@dataclass(frozen=True)
class ScaledWeight:
    """A matrix of small floating-point numbers [R, C] and their scales, float32 [R or 1, C or 1]."""

    numbers: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        """float32 [R, C]."""
        return self.numbers.float() * self.scales

    def blocks(self) -> None:
        """There is no form of it that engines compute with."""
        return


class Quantization(Protocol):
    """One way of quantizing, as a configuration announces it."""

    def names(self, weight: str, stored: StoredTensors) -> tuple[str, ...]:
        """The tensors that stand for `weight`; none where it is not quantized."""

    def read(self, weight: str, stored: StoredTensors) -> GroupedWeight | ScaledWeight:
        """What they stand for."""


def unpacked(words: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The fields of int32 words [R, W], lowest bits first: uint8 [R, W * 32 / num_bits]."""
    shifts = torch.arange(0, 32, num_bits, dtype=torch.int32)
    fields = (words.unsqueeze(-1) >> shifts) & ((1 << num_bits) - 1)
    return fields.to(torch.uint8).flatten(1)


def beside(weight: str, *suffixes: str) -> tuple[str, ...]:
    """Names of tensors of the same layer: "x.weight" and "qweight" is "x.qweight"."""
    stem = weight.removesuffix("weight")
    return tuple(stem + suffix for suffix in suffixes)


def scales_of_blocks(scales: torch.Tensor, shape: tuple[int, ...], block_shape: tuple[int, int]) -> torch.Tensor:
    """Scales of blocks, of which the last of a row or column may be cut short, spread over a matrix: float32 [R, C].

    Raises ValueError for another number of scales.
    """
    expected = tuple(-(-size // block) for size, block in zip(shape, block_shape, strict=True))
    if tuple(scales.shape) != expected:
        raise ValueError(f"scales have shape {tuple(scales.shape)}; expected {expected}, for blocks of {block_shape}")
    rows, columns = (torch.arange(size) // block for size, block in zip(shape, block_shape, strict=True))
    return scales.float()[rows][:, columns]
