"""Making room in KV memory: which session gives way to which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from easyspec.model.kv_cache import KvMemory

SessionT = TypeVar("SessionT")


def make_room(
    memory: KvMemory, num_slots: int, victims: Iterable[SessionT], give_way: Callable[[SessionT], None]
) -> bool:
    """Whether `num_slots` are available, if need be after some of `victims`, in this order, gave way."""
    if num_slots > memory.num_available:
        for victim in victims:
            give_way(victim)
            if num_slots <= memory.num_available:
                break
    return num_slots <= memory.num_available
