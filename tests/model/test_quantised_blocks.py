"""Blocks of GGUF files and groups of safetensors stand for the same numbers in the executors' form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from easyspec.model.quantised_blocks import quantised_weight
from easyspec.model.stored_blocks import StoredBlocks

_NUM_ROWS, _NUM_COLUMNS = 6, 512
# Where a block's float16 numbers stand.
_HALVES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


@pytest.mark.parametrize("name", _HALVES)
def test_blocks_stand_for_what_their_format_says(name: str) -> None:
    kind = GGMLQuantizationType[name]
    block_size, num_bytes = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (_NUM_ROWS, _NUM_COLUMNS // block_size, num_bytes), dtype=np.uint8)
    for start in _HALVES[name]:
        values = rng.uniform(-1.0, 1.0, blocks.shape[:-1]).astype(np.float16)
        blocks[..., start : start + 2] = values[..., None].view(np.uint8)
    rows = blocks.reshape(_NUM_ROWS, -1)
    weight = quantised_weight(StoredBlocks(name, (_NUM_ROWS, _NUM_COLUMNS), {"blocks": rows}))
    assert weight is not None
    assert weight.shape == (_NUM_ROWS, _NUM_COLUMNS)
    expected = torch.from_numpy(dequantize(rows, kind))
    torch.testing.assert_close(weight.dense(), expected, rtol=1e-6, atol=1e-6)
    part = weight.columns(range(64, 256))
    assert part is not None
    assert torch.equal(part.dense(), weight.dense()[:, 64:256])
    assert weight.columns(range(16, 256)) is None


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128, _NUM_COLUMNS])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_groups_with_zeros(num_bits: int, group_size: int, is_symmetric: bool) -> None:
    rng = np.random.default_rng(1)
    num_groups = _NUM_COLUMNS // group_size
    codes = rng.integers(0, 2**num_bits, (_NUM_ROWS, _NUM_COLUMNS), dtype=np.uint8)
    scales = rng.uniform(0.1, 1.0, (_NUM_ROWS, num_groups)).astype(np.float32)
    zeros = np.full_like(scales, 2 ** (num_bits - 1))
    if not is_symmetric:
        zeros = rng.integers(0, 2**num_bits, scales.shape).astype(np.float32)
    parts = {"codes": codes, "scales": scales, "zeros": zeros}
    weight = quantised_weight(StoredBlocks(f"uint{num_bits}", codes.shape, parts))
    assert weight is not None
    assert (weight.minima is None) == is_symmetric
    expected = np.repeat(scales, group_size, axis=1) * (codes - np.repeat(zeros, group_size, axis=1))
    torch.testing.assert_close(weight.dense(), torch.from_numpy(expected), rtol=1e-5, atol=1e-4)


def test_groups_in_another_order_or_of_16_columns_are_left_to_the_reader() -> None:
    codes = np.zeros((2, 64), dtype=np.uint8)
    narrow = {"codes": codes, "scales": np.ones((2, 4), np.float32), "zeros": np.ones((2, 4), np.float32)}
    assert quantised_weight(StoredBlocks("uint4", codes.shape, narrow)) is None
    ordered = {
        "codes": codes,
        "scales": np.ones((2, 2), np.float32),
        "zeros": np.ones((2, 2), np.float32),
        "group_of_column": np.arange(64) % 2,
    }
    assert quantised_weight(StoredBlocks("uint4", codes.shape, ordered)) is None
