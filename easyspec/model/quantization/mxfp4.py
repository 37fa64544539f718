"""MXFP4, the experts of gpt-oss: two numbers of four bits a byte from a table of 16, and a power of two for each 32."""

from __future__ import annotations

import torch

from easyspec.ops.weights import FP4_DOUBLED

EXPONENT_BIAS = 127


def mxfp4_values(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [..., G * 32] of blocks (uint8 [..., G, 16], the first of two numbers in the lower half of a byte) and
    exponents (uint8 [..., G])."""
    halves = codes_of(blocks).unflatten(-1, (-1, 32))  # [..., G, 32]
    exponents = scales.int().unsqueeze(-1) - EXPONENT_BIAS - 1
    return torch.ldexp(torch.tensor(FP4_DOUBLED, device=blocks.device)[halves.long()], exponents).flatten(-2)


def codes_of(blocks: torch.Tensor) -> torch.Tensor:
    """One code a byte: uint8 [..., G, 16] -> [..., G * 32]."""
    return torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-3)
