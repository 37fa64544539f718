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

    def hold(self, token_ids: Sequence[int], positions: range, held: PrefixNode) -> tuple[PrefixNode, list[int]]:
        """Hold as much of the tokens at `positions` as is known to follow `held`, which the caller holds: the node at
        which that ends, to which the caller's hold goes over, and its slots. Give back with `drop`.

        Takes as long as what is found, however long the text before it.
        """
        node, _ = self._find(token_ids, positions, held)
        return node, self._held(node, held)

    def drop(self, node: PrefixNode) -> None:
        """Give a hold back; the texts stay as long as their slots are not needed."""
        while node.parent is not None:
            node.num_holders -= 1
            if node.num_holders == 0:
                self.num_evictable += len(node.slots)
                self._note_leaf(node)
            node.parent.last_used = max(node.parent.last_used, node.last_used)
            node = node.parent

    def add(
        self, token_ids: Sequence[int], positions: range, slots: Sequence[int], held: PrefixNode
    ) -> tuple[PrefixNode, list[int], list[int]]:
        """Give the tree the `slots` of the tokens at `positions`, which follow `held`, which the caller holds.

        Returns the node to which the caller's hold goes over, the tokens' slots in the tree, and those of the caller's
        that are not needed, because the tree knew their tokens already; the caller owns them.
        """
        node, num_known = self._find(token_ids, positions, held)
        new_slots = list(slots[num_known:])
        if not new_slots:
            return node, self._held(node, held), list(slots)
        new_token_ids = list(token_ids[positions.start + num_known : positions.stop])
        self.num_slots += len(new_slots)
        # Only a node that no other session holds may grow: a hold means all of a node's tokens.
        if node is held and node is not self.root and node.num_holders == 1 and not node.children:
            node.token_ids += new_token_ids
            node.slots += new_slots
            return node, new_slots, []
        child = PrefixNode(new_token_ids, new_slots, node)
        node.children[new_token_ids[0]] = child
        self._num_nodes += 1
        self.num_evictable += len(new_slots)
        return child, self._held(child, held), list(slots[:num_known])

    def _held(self, node: PrefixNode, held: PrefixNode) -> list[int]:
        """The slots from below `held` down to `node`, whose nodes have one holder more from now on."""
        held.last_used = now = next(self._clock)
        slots: list[list[int]] = []
        while node is not held:
            if node.num_holders == 0:
                self.num_evictable -= len(node.slots)
            node.num_holders += 1
            node.last_used = now
            slots.append(node.slots)
            assert node.parent is not None, "it is below what is held"
            node = node.parent
        return [slot for part in reversed(slots) for slot in part]

    def evict(self, num_slots: int) -> list[int]:
        """Take back slots that no session holds, from the ends of texts used longest ago; fewer if there are fewer."""
        freed: list[int] = []
        while len(freed) < num_slots and self._leaves:
            last_used, _, node = heapq.heappop(self._leaves)
            # Entries stay in the heap when their node is held, used or removed: such an old entry is skipped here.
            if not self._is_evictable(node) or node.last_used != last_used:
                continue
            parent = node.parent
            assert parent is not None, "the root is always held"
            # From the end: what is left must still be the beginning of a text.
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

    def _find(self, token_ids: Sequence[int], positions: range, node: PrefixNode) -> tuple[PrefixNode, int]:
        """The node below `node` at which the longest known beginning of the tokens at `positions` ends, split off if
        that is inside a node, and its length."""
        position = positions.start
        while position < positions.stop:
            child = node.children.get(token_ids[position])
            if child is None:
                break
            length = min(len(child.token_ids), positions.stop - position)
            new = list(token_ids[position : position + length])
            num_common = length
            if child.token_ids[:length] != new:
                num_common = next(index for index in range(length) if child.token_ids[index] != new[index])
            position += num_common
            if num_common < len(child.token_ids):
                node = self._split(child, num_common)
                break
            node = child
        return node, position - positions.start

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
