"""The states that share a step: which hold slots, which fit one pass, and which make way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from drafter_service.model.state import ModelState
from easyspec.engine.room import make_room
from easyspec.model.kv_cache import KvMemory
from easyspec.model.row_layout import Segment
from easyspec.parallel.layer_groups import LayerPlan

_ItemT = TypeVar("_ItemT")
_WayT = TypeVar("_WayT")


class EarlyLevels(Protocol):
    """Runs levels of sessions whose states have `exits`."""

    def learn(self, state: ModelState) -> None:
        """Learn from the verdict on the last tree."""

    def run(self, members: Sequence[tuple[ModelState, Segment]], plan: LayerPlan) -> None:
        """Run the rows of sessions as deep as their next levels go, and add these levels; all of the members are at
        their first level, whose rows are new committed tokens, or none is."""


class Holders:
    """The states of one step, oldest first; evicted ones are left out."""

    def __init__(self, memory: KvMemory, states: list[ModelState]) -> None:
        self.states = states
        self.evicted: list[ModelState] = []
        self._memory = memory

    @property
    def drafting(self) -> list[ModelState]:
        """Those with a round under way."""
        return [state for state in self.states if state.timings is not None]

    def make_room(self, num_slots: int, state: ModelState) -> bool:
        """Whether there are so many slots, if need be from younger sessions; else the session gives way itself."""
        for other in self.states:
            if num_slots > self._memory.num_available:
                other.drop_ahead()
        younger = itertools.takewhile(lambda other: other is not state, [*reversed(self.states)])
        if make_room(self._memory, num_slots, younger, self._evict):
            return True
        self._evict(state)
        return False

    def _evict(self, state: ModelState) -> None:
        self._memory.num_preemptions += 1
        self.states.remove(state)
        self.evicted.append(state)
        state.give_up()


def by_way(items: Sequence[_ItemT], way_of: Callable[[_ItemT], _WayT]) -> Iterable[tuple[_WayT, list[_ItemT]]]:
    """The items of each way; a pass is by one plan."""
    groups: dict[_WayT, list[_ItemT]] = {}
    for item in items:
        groups.setdefault(way_of(item), []).append(item)
    return groups.items()


def fitting(items: Sequence[_ItemT], num_rows_of: Callable[[_ItemT], int], most_rows: int) -> list[_ItemT]:
    """The first of `items` that fit one pass together, at least one; the others follow in a later one."""
    taken: list[_ItemT] = []
    for item in items:
        most_rows -= num_rows_of(item)
        if taken and most_rows < 0:
            break
        taken.append(item)
    return taken
