from __future__ import annotations

import pytest
import torch

from easyspec.ops.kv_pool import KVPool, padded_head_dim

CPU = torch.device("cpu")


def test_heads_are_filled_up_to_16() -> None:
    assert [padded_head_dim(size) for size in (1, 8, 16, 20, 64, 80, 96)] == [16, 16, 16, 32, 64, 80, 96]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_slot_takes_its_bytes(dtype: torch.dtype) -> None:
    pool = KVPool(3, 2, 20, 11, dtype, CPU)
    assert pool.keys.shape == pool.values.shape == (3, 2, 12, 32)  # the trash slot comes on top
    assert pool.keys.dtype == pool.values.dtype == dtype
    assert pool.keys.nbytes + pool.values.nbytes == 12 * KVPool.slot_bytes(3, 2, 20, dtype)
    assert not pool.keys.any()
    assert not pool.values.any()


def test_a_pool_beyond_all_memory_is_an_error_of_memory() -> None:
    with pytest.raises(MemoryError, match="bytes of keys or values"):
        KVPool(64, 64, 128, 1 << 36, torch.float32, CPU)
