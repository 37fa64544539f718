"""KV memory: one pool of token slots per process, and the slots that a session holds.

Dimensions: `L` layers, `H` KV heads, `D` head size, `S` slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from easyspec.errors import CapacityError
from easyspec.model.config import ModelConfig

# Padding rows write here and padding columns read here; never handed out, always finite.
TRASH_SLOT = 0


class KVPool:
    """Keys and values of every session of the process: `table` [L * H * S, D + D + 1], a row being key, value, 1.

    One flat table, so that reading any layers, heads and slots is a single gather of rows.

    The last column is constantly 1: weighting it sums the attention weights in exactly the order
    in which the values are summed, which is what makes the softmax denominator reproducible
    (attention.py). Slots are promised first (`reserve`, so that a session once admitted never runs out) and
    taken later (`allocate`).
    """

    def __init__(self, config: ModelConfig, num_slots: int, device: torch.device) -> None:
        self._num_planes = config.num_layers * config.num_kv_heads
        self._plane_size = num_slots + 1
        num_entries = self._num_planes * self._plane_size
        self.table = torch.zeros(num_entries, 2 * config.head_dim + 1, dtype=config.dtype, device=device)
        self.table[:, -1] = 1.0
        self.writable = self.table[:, :-1]
        self.num_slots = num_slots
        self._free = list(range(num_slots, 0, -1))
        self._num_reserved = 0

    def entries(self, slots: torch.Tensor) -> torch.Tensor:
        """Table rows of `slots` [T] in every layer and head, [L * H, T]; layer l owns rows l * H to (l + 1) * H - 1."""
        planes = torch.arange(self._num_planes, device=slots.device)[:, None] * self._plane_size
        return planes + slots

    @property
    def num_used_slots(self) -> int:
        return self.num_slots - len(self._free)

    @property
    def num_reserved_slots(self) -> int:
        return self._num_reserved

    def reserve(self, num_slots: int) -> None:
        """Promise slots to a session; raises CapacityError if they are promised to others already."""
        if self._num_reserved + num_slots > self.num_slots:
            free = self.num_slots - self._num_reserved
            raise CapacityError(f"KV memory is full: {num_slots} token slots wanted, {free} of {self.num_slots} free")
        self._num_reserved += num_slots

    def cancel_reservation(self, num_slots: int) -> None:
        """Take a promise back."""
        self._num_reserved -= num_slots

    def allocate(self, num_slots: int) -> list[int]:
        """Take slots out of the pool; the caller has reserved them."""
        assert num_slots <= len(self._free), "allocation beyond the reservation"
        if num_slots == 0:
            return []
        taken = self._free[-num_slots:]
        del self._free[-num_slots:]
        taken.reverse()
        return taken

    def free(self, slots: Sequence[int]) -> None:
        """Give slots back."""
        self._free.extend(reversed(slots))


class SessionSlots:
    """The slots of one session: of its cached tokens by position, and how many were promised.

    `by_position` is an int64 array whose unused tail points at the trash slot; its length is a
    multiple of `block_size`, so that it can be read in whole blocks.
    """

    def __init__(self, pool: KVPool, num_reserved: int, block_size: int) -> None:
        pool.reserve(num_reserved)
        self._pool = pool
        self._num_reserved = num_reserved
        num_blocks = -(-num_reserved // block_size)
        self.by_position: npt.NDArray[np.int64] = np.full(num_blocks * block_size, TRASH_SLOT, dtype=np.int64)
        self.num_cached = 0

    def append(self, slots: Sequence[int]) -> None:
        """The next positions live in `slots` (taken from the pool before)."""
        self.by_position[self.num_cached : self.num_cached + len(slots)] = slots
        self.num_cached += len(slots)

    def extend(self, num_tokens: int) -> list[int]:
        """Take slots for the next `num_tokens` positions and return them."""
        slots = self._pool.allocate(num_tokens)
        self.append(slots)
        return slots

    def truncate(self, num_cached: int) -> None:
        """Forget the positions from `num_cached` on."""
        dropped = self.by_position[num_cached : self.num_cached].tolist()
        self.by_position[num_cached : self.num_cached] = TRASH_SLOT
        self.num_cached = num_cached
        self._pool.free(dropped)

    def release(self) -> None:
        """Give everything back; idempotent."""
        self.truncate(0)
        self._pool.cancel_reservation(self._num_reserved)
        self._num_reserved = 0
