"""Which replica a prompt goes to, so that prompts that begin alike meet: rendezvous hashing, bounded by load."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar


class Loaded(Protocol):
    """A replica by its address, and how many sessions it has."""

    address: str
    num_sessions: int


_ReplicaT = TypeVar("_ReplicaT", bound=Loaded)

# Lengths of beginnings, in tokens. What is shorter than the first has nothing worth meeting for.
_BEGINNINGS = (64, 256, 1024)
# A replica may have so many times its share of the sessions before prompts that prefer it go elsewhere.
_MAX_SHARE = 1.25


def preferred(replicas: Sequence[_ReplicaT], prompt: Sequence[int]) -> _ReplicaT | None:
    """The replica for a prompt; None if it is short, or if those for its beginnings have enough to do.

    All prompts with one beginning prefer one replica, whichever gateway asks. Where that has more than its share, those
    with a longer beginning in common still meet at another.
    """
    most = math.ceil(_MAX_SHARE * (sum(replica.num_sessions for replica in replicas) + 1) / len(replicas))
    for length in _BEGINNINGS:
        if len(prompt) < length:
            return None
        beginning = array("q", prompt[:length]).tobytes()
        best = max(replicas, key=lambda replica: _score(replica.address, beginning))
        if best.num_sessions < most:
            return best
    return None


def _score(address: str, beginning: bytes) -> bytes:
    return blake2b(beginning, digest_size=8, key=blake2b(address.encode(), digest_size=32).digest()).digest()
