"""compressed-tensors: integers of four or eight bits packed into words, bytes, or FP8, with scales for a tensor, for
each row, for groups of columns, or for blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from easyspec.errors import ConfigurationError
from easyspec.model.quantization.scheme import (
    GroupedWeight,
    ScaledWeight,
    StoredTensors,
    beside,
    scales_of_blocks,
    unpacked,
)

_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class CompressedTensors:
    """Each layer says by its tensors how it is stored; `num_bits` is that of packed ones, `block_shape` that of blocks
    that have a scale, if there are such."""

    num_bits: int
    block_shape: tuple[int, int] | None = None

    def names(self, weight: str, stored: StoredTensors) -> tuple[str, ...]:
        packed, scale, *others = beside(
            weight, "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"
        )
        if scale not in stored:
            return ()
        further = tuple(name for name in others if name in stored)
        return (packed if packed in stored else weight, scale, *further)

    def read(self, weight: str, stored: StoredTensors) -> GroupedWeight | ScaledWeight:
        packed, scale_name, zero_name, g_idx, shape_name = beside(
            weight, "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"
        )
        scales = stored.stored(scale_name).float()
        if packed in stored:
            num_bits = self.num_bits
            num_rows, num_columns = stored.stored(shape_name).tolist()
            codes = unpacked(stored.stored(packed), num_bits)[:, :num_columns].contiguous()
            zeros = None
            if zero_name in stored:  # packed along the rows
                zeros = unpacked(stored.stored(zero_name).T.contiguous(), num_bits).T[:num_rows].float()
        else:
            num_bits, numbers = 8, stored.stored(weight)
            num_rows = len(numbers)
            if numbers.dtype in _FLOATS:
                return ScaledWeight(numbers, self._spread(scales, numbers))
            if numbers.dtype is not torch.int8:
                raise ConfigurationError(f"{weight!r} is stored as {numbers.dtype}; allowed: int8, float8")
            codes = (numbers.to(torch.int16) + 128).to(torch.uint8)
            zeros = stored.stored(zero_name).float() + 128 if zero_name in stored else None
        scales = _at_least_rows(scales, num_rows)
        # Codes are numbers around zero, moved up by half their range.
        offset = float(1 << (num_bits - 1))
        zeros = torch.full_like(scales, offset) if zeros is None else _at_least_rows(zeros, num_rows)
        groups = stored.stored(g_idx).long() if g_idx in stored else None
        return GroupedWeight(num_bits, codes, scales, zeros.contiguous(), groups)

    def _spread(self, scales: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Scales of FP8 numbers as they are multiplied."""
        scales = scales if scales.dim() == 2 else scales.reshape(-1, 1)
        if scales.shape[1] == 1:  # of the tensor, or of each row
            return scales
        num_rows, num_columns = numbers.shape
        block_shape = self.block_shape or (1, num_columns // scales.shape[1])
        return scales_of_blocks(scales, (num_rows, num_columns), block_shape)


def _at_least_rows(scales: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Scales [R, G] from scales of a tensor (one number), of rows or of groups."""
    if scales.dim() < 2:
        scales = scales.reshape(-1, 1)
    return scales if len(scales) > 1 else scales.expand(num_rows, -1).contiguous()
