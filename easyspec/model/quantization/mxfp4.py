"""MXFP4, the experts of gpt-oss: two numbers of four bits a byte from a table of 16, and a power of two for each 32."""

from __future__ import annotations

import torch

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPONENT_BIAS = 127


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [..., G * 32] of blocks (uint8 [..., G, 16], the first of two numbers in the lower half of a byte) and
    exponents (uint8 [..., G])."""
    table = torch.tensor(VALUES)
    halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # [..., G, 32]
    return torch.ldexp(table[halves.long()], scales.int().unsqueeze(-1) - _EXPONENT_BIAS).flatten(-2)
