"""Seeded noise: what couples the drafter's guesses to the verifier's choices.

Dimension key: `R` rows, `K` tokens.

The noise is a pure function of (seed, absolute position, token id). Its 64 random bits come from nested splitmix64
streams: element `position` of the seed's stream is the state of a stream, of which element `token_id` is taken.
Integer arithmetic wraps alike on every device, so these bits are the same everywhere. The two logarithms are taken
in float64 and rounded to float32 once, which hides the last bits in which devices differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIFORM_BITS = 32
"""Resolution: uniforms are (k + 1/2) / 2^32 with k in 0 .. 2^32 - 1: exact in float64, never 0 or 1."""

MIN_GUMBEL_NOISE = -3.1299946308135986
"""float32 noise of k = 0; no token's noise is below."""

_STREAM_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)

# On a CPU the dozen passes over 64-bit integers run over pieces that stay in the cache: 2x faster on wide rows.
_CACHED_ELEMENTS = 2**15


def signed_seed(seed: int) -> int:
    """The two's complement int64 of a uint64 seed, as tensors of seeds want it."""
    return seed - 2**64 if seed >= 2**63 else seed


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float32 [R, K], on the device of `token_ids`.

    `seeds` and `positions` are int64 [R], `token_ids` is int64 [K] for all rows or [R, K]. An element depends on
    its own seed, position and token id alone, not on the tensor around it.
    """
    return gumbel_of_bits(uniform_bits(seeds, positions, token_ids))


def uniform_bits(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """The integers k behind the noise, int64 [R, K] in 0 .. 2^32 - 1; arguments as for `gumbel_noise`."""
    streams = _mix_(_element(positions, _mix_(_element(seeds, 0)))).unsqueeze(1)  # [R, 1]
    num_tokens = token_ids.shape[-1]
    bits = torch.empty(len(seeds), num_tokens, dtype=torch.int64, device=token_ids.device)
    num_columns = num_tokens if bits.is_cuda else _CACHED_ELEMENTS // max(1, len(seeds))
    num_columns = max(1, num_columns)
    for begin in range(0, num_tokens, num_columns):
        columns = slice(begin, begin + num_columns)
        mixed = _mix_(_element(token_ids[..., columns], streams))
        bits[:, columns] = _logical_shift_right(mixed, 64 - UNIFORM_BITS)
    return bits


def gumbel_of_bits(bits: Tensor) -> Tensor:
    """The noise of `uniform_bits`, float32 of the same shape; it grows with them."""
    uniforms = bits.to(torch.float64).add_(0.5).mul_(2.0**-UNIFORM_BITS)
    return uniforms.log_().neg_().log_().neg_().to(torch.float32)


def _element(index: Tensor, state: Tensor | int) -> Tensor:
    """Element `index` of the stream with this state, before mixing."""
    return (index + 1) * signed_seed(_STREAM_INCREMENT) + state


def _mix_(bits: Tensor) -> Tensor:
    """splitmix64's finaliser, in place."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        bits.bitwise_xor_(_logical_shift_right(bits, shift)).mul_(signed_seed(multiplier))
    return bits.bitwise_xor_(_logical_shift_right(bits, _SHIFTS[-1]))


def _logical_shift_right(bits: Tensor, shift: int) -> Tensor:
    # int64 shifts copy the sign bit: mask what they bring in.
    return (bits >> shift).bitwise_and_(2 ** (64 - shift) - 1)
