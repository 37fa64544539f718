"""Prefixes of texts whose K and V are in the pool: a radix tree over tokens, each with its slot.

Sessions hold the node at which their prefix ends, and with it every node above. A node that no session holds stays as a
cache: its slots count as free, and are taken back from the ends of the texts used longest ago.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class PrefixNode:
    """Consecutive tokens of all texts that pass here, and their slots; `parent` is None for the root and the evicted.

    `num_holders` counts the sessions that hold this node or one below.
    """

    token_ids: list[int]
    slots: list[int]
    parent: PrefixNode | None
    children: dict[int, PrefixNode] = field(default_factory=dict)
    num_holders: int = 0
    last_used: int = 0


class PrefixCache:
    """The tree. It owns the slots in it; `num_evictable` of them are held by no session."""

    def __init__(self) -> None:
        self.root = PrefixNode([], [], None, num_holders=1)
        self.num_evictable = 0
        self.num_slots = 0
        self._clock = itertools.count(1)
        # Leaves that no session holds, by when they were used last; entries that became untrue are skipped when met.
        self._leaves: list[tuple[int, int, PrefixNode]] = []
        self._num_nodes = 0

    def hold(self, token_ids: Sequence[int]) -> tuple[PrefixNode, list[int]]:
        """Hold the longest prefix there is: the node it ends at, and its slots. Give back with `drop`."""
        node, num_matched = self._find(token_ids)
        now = next(self._clock)
        slots: list[list[int]] = []
        above: PrefixNode | None = node
        while above is not None:
            if above.num_holders == 0:
                self.num_evictable -= len(above.slots)
            above.num_holders += 1
            above.last_used = now
            slots.append(above.slots)
            above = above.parent
        held = [slot for part in reversed(slots) for slot in part]
        assert len(held) == num_matched, "the path is the prefix"
        return node, held

    def drop(self, node: PrefixNode) -> None:
        """Give a hold back; the texts stay as long as their slots are not needed."""
        above: PrefixNode | None = node
        while above is not None:
            above.num_holders -= 1
            if above.num_holders == 0:
                self.num_evictable += len(above.slots)
                self._note_leaf(above)
            above = above.parent

    def add(self, token_ids: Sequence[int], slots: Sequence[int], held: PrefixNode) -> list[int]:
        """Give the tree the slots of a text, of which `held` is a prefix that the caller holds.

        Returns the slots that are not needed, because the tree knew their tokens already; the caller owns them.
        """
        node, num_known = self._find(token_ids)
        num_held = self._length(held)
        new_token_ids, new_slots = list(token_ids[num_known:]), list(slots[num_known:])
        if new_token_ids:
            self.num_slots += len(new_slots)
            if node is held and node is not self.root and node.num_holders == 1 and not node.children:
                node.token_ids += new_token_ids
                node.slots += new_slots
            else:
                child = PrefixNode(new_token_ids, new_slots, node, last_used=next(self._clock))
                node.children[new_token_ids[0]] = child
                self._num_nodes += 1
                self.num_evictable += len(new_slots)
                self._note_leaf(child)
        return list(slots[num_held:num_known])

    def evict(self, num_slots: int) -> list[int]:
        """Take back slots that no session holds, from the ends of texts used longest ago; fewer if there are fewer."""
        freed: list[int] = []
        while len(freed) < num_slots and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            if not self._is_evictable(node) or node.last_used != last_used:
                continue
            parent = node.parent
            assert parent is not None, "the root is always held"
            num_kept = max(0, len(node.slots) - (num_slots - len(freed)))
            freed += node.slots[num_kept:]
            if num_kept:
                del node.slots[num_kept:], node.token_ids[num_kept:]
                self._note_leaf(node)
            else:
                del parent.children[node.token_ids[0]]
                node.parent = None
                self._num_nodes -= 1
                self._note_leaf(parent)
        self.num_evictable -= len(freed)
        self.num_slots -= len(freed)
        return freed

    def _find(self, token_ids: Sequence[int]) -> tuple[PrefixNode, int]:
        """The node at which the longest known prefix ends, split off if that is inside a node, and its length."""
        node, position = self.root, 0
        while position < len(token_ids):
            child = node.children.get(token_ids[position])
            if child is None:
                break
            num_common = _num_common(child.token_ids, token_ids, position)
            position += num_common
            if num_common < len(child.token_ids):
                return self._split(child, num_common), position
            node = child
        return node, position

    def _split(self, node: PrefixNode, length: int) -> PrefixNode:
        """Cut a node in two and return the upper one; `node` stays the lower, so that holds on it stay true."""
        parent = node.parent
        assert parent is not None, "the root is never split"
        upper = PrefixNode(
            node.token_ids[:length],
            node.slots[:length],
            parent,
            num_holders=node.num_holders,
            last_used=node.last_used,
        )
        parent.children[upper.token_ids[0]] = upper
        del node.token_ids[:length], node.slots[:length]
        upper.children[node.token_ids[0]] = node
        node.parent = upper
        self._num_nodes += 1
        return upper

    @staticmethod
    def _length(node: PrefixNode) -> int:
        length = 0
        above: PrefixNode | None = node
        while above is not None:
            length += len(above.slots)
            above = above.parent
        return length

    @staticmethod
    def _is_evictable(node: PrefixNode) -> bool:
        return node.num_holders == 0 and not node.children and node.parent is not None

    def _note_leaf(self, node: PrefixNode) -> None:
        if not self._is_evictable(node):
            return
        heapq.heappush(self._leaves, (node.last_used, next(self._clock), node))
        if len(self._leaves) > 2 * self._num_nodes + 64:  # more of them are untrue than true
            true = {id(entry[2]): entry for entry in self._leaves if entry[0] == entry[2].last_used}
            self._leaves = [entry for entry in true.values() if self._is_evictable(entry[2])]
            heapq.heapify(self._leaves)


def _num_common(node_token_ids: list[int], token_ids: Sequence[int], start: int) -> int:
    """How many tokens of a node agree with `token_ids` from `start` on."""
    length = min(len(node_token_ids), len(token_ids) - start)
    if node_token_ids[:length] == list(token_ids[start : start + length]):
        return length
    return next(index for index in range(length) if node_token_ids[index] != token_ids[start + index])
