"""The memory of keys and values, as executors read it in place.

Dimensions: `L` layers, `H` KV heads, `D` head size filled up to whole 16s, `S` slots.
"""

from __future__ import annotations

import math
import mmap

import torch

# Never handed out; its keys and values are always finite.
TRASH_SLOT = 0
_HEAD_MULTIPLE = 16


class KVPool:
    """Keys and values of every session of the process: two planes [L, H, S + 1, D] of one type.

    A slot is one token's place in all layers and heads. Nothing is copied when a session reads its slots.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_kv_heads, num_slots + 1, padded_head_dim(head_dim))
        self.keys = _zeros(shape, dtype, device)
        self.values = _zeros(shape, dtype, device)
        self.num_slots = num_slots
        self.head_dim = head_dim

    @staticmethod
    def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * num_kv_heads * padded_head_dim(head_dim) * dtype.itemsize


def padded_head_dim(head_dim: int) -> int:
    """Numbers that a head's key takes."""
    return -(-head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU a page is taken when its first token comes, where torch would fill gigabytes at start-up.

    Raises MemoryError where the system promises less than that.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {num_bytes} bytes of keys or values") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)
