"""KV memory: the token slots of a process's pool, the sessions that hold them, and which may take them back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from easyspec.model.prefix_cache import PrefixCache, PrefixNode
from easyspec.ops.kv_pool import TRASH_SLOT, KVPool
from easyspec.speculation.messages import KvUsage

_FEWEST_POSITIONS = 128


class KvMemory:
    """The slots of a pool as a budget: taken as sessions grow, shared where texts begin alike.

    Slots that only keep prefixes of past texts are `num_available`, like free ones. Which session has to give way when
    there are too few is for the caller to say.
    """

    def __init__(self, pool: KVPool, *, shares_prefixes: bool) -> None:
        self.pool = pool
        self.shares_prefixes = shares_prefixes
        self.prefixes = PrefixCache()
        self.num_query_tokens = 0
        self.num_hit_tokens = 0
        self.num_preemptions = 0
        self._free = list(range(pool.num_slots, 0, -1))

    @property
    def num_slots(self) -> int:
        return self.pool.num_slots

    @property
    def num_available(self) -> int:
        return len(self._free) + self.prefixes.num_evictable

    @property
    def num_used_slots(self) -> int:
        """Slots that sessions hold."""
        return self.num_slots - self.num_available

    def usage(self, num_sessions: int) -> KvUsage:
        """KV memory as it is now; may be read from another thread."""
        return KvUsage(
            num_slots=self.num_slots,
            num_used_slots=self.num_used_slots,
            num_sessions=num_sessions,
            num_cached_slots=self.prefixes.num_evictable,
            num_prefix_query_tokens=self.num_query_tokens,
            num_prefix_hit_tokens=self.num_hit_tokens,
            num_preemptions=self.num_preemptions,
        )

    def allocate(self, num_slots: int) -> list[int]:
        """Take slots; the caller has seen that so many are available."""
        assert num_slots <= self.num_available, "allocation beyond what is available"
        if num_slots > len(self._free):
            self.free(self.prefixes.evict(num_slots - len(self._free)))
        if num_slots == 0:
            return []
        taken = self._free[-num_slots:]
        del self._free[-num_slots:]
        taken.reverse()
        return taken

    def free(self, slots: Sequence[int]) -> None:
        # The end of the list is taken first: reversed, so that slots that lay together are handed out in order again.
        self._free.extend(reversed(slots))


class SessionSlots:
    """The slots of one session's cached tokens by position: a prefix that is shared, then its own.

    `by_position` is an int64 array whose unused tail points at the trash slot.
    """

    def __init__(self, memory: KvMemory) -> None:
        self._memory = memory
        self._prefix: PrefixNode | None = None
        self.by_position: npt.NDArray[np.int64] = np.full(_FEWEST_POSITIONS, TRASH_SLOT, dtype=np.int64)
        self.num_cached = 0
        self.num_shared = 0

    @property
    def prefix(self) -> PrefixNode:
        """Where the shared prefix ends."""
        return self._prefix or self._memory.prefixes.root

    def append(self, slots: Sequence[int]) -> None:
        """The next positions live in `slots`, which the caller has taken from memory."""
        num_cached = self.num_cached + len(slots)
        if num_cached > len(self.by_position):
            tail = np.full(max(num_cached, len(self.by_position)), TRASH_SLOT, dtype=np.int64)
            grown = np.concatenate([self.by_position, tail])
            self.by_position = grown[: len(grown) // _FEWEST_POSITIONS * _FEWEST_POSITIONS]
        self.by_position[self.num_cached : num_cached] = slots
        self.num_cached = num_cached

    def extend(self, num_tokens: int) -> list[int]:
        """Take slots for the next `num_tokens` positions and return them."""
        slots = self._memory.allocate(num_tokens)
        self.append(slots)
        return slots

    def truncate(self, num_cached: int) -> None:
        """Forget the positions from `num_cached` on, which are the session's own."""
        assert num_cached >= self.num_shared, "what is shared is not forgotten piece by piece"
        dropped = self.by_position[num_cached : self.num_cached].tolist()
        # Before they are freed: what the array names beyond the cached positions may soon be another session's.
        self.by_position[num_cached : self.num_cached] = TRASH_SLOT
        self.num_cached = num_cached
        self._memory.free(dropped)

    def take_prefix(self, token_ids: Sequence[int], most: int | None = None) -> int:
        """Hold what is known of the first `most` of `token_ids`, which begin with the present prefix; returns how many
        tokens that is beyond it.

        Does nothing for a session that has cached tokens of its own.
        """
        if not self._memory.shares_prefixes or self.num_cached > self.num_shared:
            return 0
        positions = range(self.num_cached, len(token_ids) if most is None else most)
        self._prefix, slots = self._memory.prefixes.hold(token_ids, positions, self.prefix)
        self.append(slots)
        self.num_shared = self.num_cached
        return len(slots)

    def share(self, token_ids: Sequence[int]) -> None:
        """Let other sessions use what is cached; `token_ids` begin with the cached tokens, whose K and V must be exact.

        If another session cached the same tokens first, adopt its slots and free ours.
        """
        assert len(token_ids) >= self.num_cached, "all that is cached"
        if not self._memory.shares_prefixes or self.num_cached == self.num_shared:
            return
        own = range(self.num_shared, self.num_cached)
        slots = self.by_position[own.start : own.stop].tolist()
        self._prefix, known, spare = self._memory.prefixes.add(token_ids, own, slots, self.prefix)
        self._memory.free(spare)
        # Both have the same bits for the same tokens, so that later rows do not change.
        self.by_position[own.start : own.stop] = known
        self.num_shared = self.num_cached

    def release(self) -> None:
        """Give everything back; idempotent."""
        self.truncate(self.num_shared)
        if self._prefix is not None:
            self._memory.prefixes.drop(self._prefix)
            self._prefix = None
        self.by_position[: self.num_cached] = TRASH_SLOT
        self.num_cached = self.num_shared = 0
