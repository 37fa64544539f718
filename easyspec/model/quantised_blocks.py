"""From weights as quantised checkpoints store them to the executors' form of integers, scales and minima.

Dimensions: `R` rows, `C` columns, `B` blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from easyspec.model.quantization.mxfp4 import EXPONENT_BIAS
from easyspec.model.stored_blocks import StoredBlocks
from easyspec.ops.weights import GROUP_SIZE, QuantisedWeight

Bytes = NDArray[np.uint8]


def quantised_weight(stored: StoredBlocks) -> QuantisedWeight | None:
    """The same numbers in groups of 32 columns, or None where groups are smaller or not in the order of the columns."""
    if "blocks" in stored.parts:
        (num_bytes, decode), blocks = _BLOCKS[stored.format], stored.parts["blocks"]
        return decode(blocks.reshape(len(blocks), -1, num_bytes))
    if "exponents" in stored.parts:
        return _mxfp4(stored.parts["codes"], stored.parts["exponents"])
    if "group_of_column" in stored.parts:
        return None
    codes, scales, zeros = (stored.parts[name] for name in ("codes", "scales", "zeros"))
    num_columns, num_groups = codes.shape[1], scales.shape[1]
    group_size = -(-num_columns // num_groups)
    if group_size % GROUP_SIZE != 0 and num_groups > 1:
        return None
    bits = 4 if stored.format == "uint4" else 8
    middle = 8 if bits == 4 else 128
    repeats = -(-num_columns // GROUP_SIZE) if num_groups == 1 else group_size // GROUP_SIZE
    wide = [np.repeat(part.astype(np.float32), repeats, axis=1) for part in (scales, zeros)]
    wide = [part[:, : -(-num_columns // GROUP_SIZE)] for part in wide]
    signed = codes.astype(np.int16) - (0 if bits == 4 else middle)
    minima = None
    if not np.all(wide[1] == middle):
        minima = -wide[0] * (wide[1] - (0 if bits == 4 else middle))
    return _weight(bits, signed, wide[0], minima, has_wide_scales=True)


def _weight(
    bits: int, codes: NDArray[Any], scales: NDArray[Any], minima: NDArray[Any] | None = None, *, has_wide_scales: bool
) -> QuantisedWeight:
    """Arrays [R, ...] of which all but the first dimension follow the columns."""
    num_rows = len(codes)
    return QuantisedWeight(
        bits,
        torch.from_numpy(np.ascontiguousarray(codes.reshape(num_rows, -1).astype(np.int8))),
        torch.from_numpy(np.ascontiguousarray(scales.reshape(num_rows, -1).astype(np.float32))),
        None if minima is None else torch.from_numpy(minima.reshape(num_rows, -1).astype(np.float32)),
        has_wide_scales=has_wide_scales,
    )


def _mxfp4(codes: Bytes, exponents: Bytes) -> QuantisedWeight:
    """Places in a table of twice the numbers [R, C], and powers of two of groups of 32 [R, G]."""
    scales = torch.ldexp(torch.ones(exponents.shape), torch.from_numpy(exponents.astype(np.int32)) - EXPONENT_BIAS - 1)
    return QuantisedWeight(4, torch.from_numpy(codes.astype(np.int8)), scales, has_wide_scales=True, is_fp4=True)


def _mxfp4_blocks(blocks: Bytes) -> QuantisedWeight:
    return _mxfp4(_nibbles(blocks[..., 1:]).reshape(len(blocks), -1), blocks[..., 0])


def _halves(blocks: Bytes, start: int) -> NDArray[np.float32]:
    """The float16 number at byte `start` of every block, [R, B]."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(codes: Bytes) -> Bytes:
    """Low halves of the bytes, then high halves: [..., N] -> [..., 2 N]."""
    return np.concatenate([codes & 15, codes >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """16 where a bit of the 32 that begin at byte `start` is set, [R, B, 32]."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[..., start : start + 4]), axis=-1, bitorder="little")
    return np.left_shift(bits, 4, dtype=np.uint8)


def _q8_0(blocks: Bytes) -> QuantisedWeight:
    return _weight(8, blocks[..., 2:].view(np.int8), _halves(blocks, 0), has_wide_scales=False)


def _q4_0(blocks: Bytes) -> QuantisedWeight:
    return _weight(4, _nibbles(blocks[..., 2:]), _halves(blocks, 0), has_wide_scales=False)


def _q4_1(blocks: Bytes) -> QuantisedWeight:
    return _weight(4, _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2), has_wide_scales=False)


def _q5_0(blocks: Bytes) -> QuantisedWeight:
    codes = (_nibbles(blocks[..., 6:]) | _fifth_bits(blocks, 2)).astype(np.int16) - 16
    return _weight(8, codes, _halves(blocks, 0), has_wide_scales=False)


def _q5_1(blocks: Bytes) -> QuantisedWeight:
    codes = _nibbles(blocks[..., 8:]) | _fifth_bits(blocks, 4)
    return _weight(8, codes, _halves(blocks, 0), _halves(blocks, 2), has_wide_scales=False)


def _six_bit_scales(blocks: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and minima of the eight groups of a K block, multiplied out: [R, B, 8] each."""
    packed = blocks[..., 4:16]
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=-1)
    return _halves(blocks, 0)[..., None] * scales, -_halves(blocks, 2)[..., None] * minima


def _k_nibbles(codes: Bytes) -> Bytes:
    """Of every 32 bytes the low halves are a group and the high halves the next: [R, B, 128] -> [R, B, 8, 32]."""
    pairs = codes.reshape(*codes.shape[:-1], 4, 32)
    return np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(*codes.shape[:-1], 8, 32)


def _q4_k(blocks: Bytes) -> QuantisedWeight:
    scales, minima = _six_bit_scales(blocks)
    return _weight(4, _k_nibbles(blocks[..., 16:]), scales, minima, has_wide_scales=True)


def _q5_k(blocks: Bytes) -> QuantisedWeight:
    scales, minima = _six_bit_scales(blocks)
    fifth = blocks[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [R, B, 8, 32]
    return _weight(8, _k_nibbles(blocks[..., 48:]) | fifth << 4, scales, minima, has_wide_scales=True)


def _q6_k(blocks: Bytes) -> QuantisedWeight:
    shape = blocks.shape[:-1]
    low = blocks[..., :128].reshape(*shape, 2, 2, 32)  # [R, B, 128 columns, 32 bytes]
    high = blocks[..., 128:192].reshape(*shape, 2, 1, 32)
    four = np.concatenate([low & 15, low >> 4], axis=-2)  # columns 0-31, 32-63, 64-95, 96-127
    two = high >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None] & 3
    codes = (four | two << 4).astype(np.int16) - 32
    scales = _halves(blocks, 208)[..., None] * blocks[..., 192:208].view(np.int8)
    return _weight(8, codes, scales, has_wide_scales=True)


# Bytes of a block, and what reads one.
_BLOCKS: Mapping[str, tuple[int, Callable[[Bytes], QuantisedWeight]]] = MappingProxyType(
    {
        "Q8_0": (34, _q8_0),
        "Q4_0": (18, _q4_0),
        "Q4_1": (20, _q4_1),
        "Q5_0": (22, _q5_0),
        "Q5_1": (24, _q5_1),
        "Q4_K": (144, _q4_k),
        "Q5_K": (176, _q5_k),
        "Q6_K": (210, _q6_k),
        "MXFP4": (17, _mxfp4_blocks),
    }
)
