from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.ops.kv_pool import TRASH_SLOT, KVPool

CPU = torch.device("cpu")
NUM_SLOTS = 40


def memory(num_slots: int = NUM_SLOTS, *, shares_prefixes: bool = True) -> KvMemory:
    return KvMemory(KVPool(1, 1, 4, num_slots, torch.float32, CPU), shares_prefixes=shares_prefixes)


@dataclass(eq=False)
class Held:
    """A session's text, of which `slots` are cached."""

    slots: SessionSlots
    token_ids: list[int]
    tree: list[int] = field(default_factory=list)
    is_open: bool = True

    @property
    def cached(self) -> list[int]:
        return self.token_ids[: self.slots.num_cached]


class MemoryMachine(RuleBasedStateMachine):
    """Sessions come, share, draft, commit, forget and go in any order, over few tokens, so that texts often agree.

    `written` is what was computed into every slot: the text up to its token, which is all that K and V depend on.
    """

    sessions: Bundle[Held] = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.memory = memory()
        self.held: list[Held] = []
        self.written: dict[int, tuple[int, ...]] = {}

    def write(self, held: Held, slots: list[int]) -> None:
        for slot, length in zip(slots, range(held.slots.num_cached - len(slots), held.slots.num_cached), strict=True):
            self.written[slot] = tuple(held.token_ids[: length + 1])

    @rule(target=sessions, token_ids=st.lists(st.integers(0, 1), max_size=12))
    def open(self, token_ids: list[int]) -> Held:
        held = Held(SessionSlots(self.memory), token_ids)
        self.held.append(held)
        return held

    @rule(held=sessions)
    def take_prefix(self, held: Held) -> None:
        if held.is_open:
            before = held.slots.num_cached
            assert held.slots.take_prefix(held.token_ids) == held.slots.num_cached - before

    @rule(held=sessions, data=st.data())
    def prefill(self, held: Held, data: st.DataObject) -> None:
        """A piece of a text, without looking what there is."""
        if held.is_open:
            most = min(self.memory.num_available, len(held.token_ids) - held.slots.num_cached)
            self.write(held, held.slots.extend(data.draw(st.integers(0, most))))

    @rule(held=sessions, data=st.data())
    def draft(self, held: Held, data: st.DataObject) -> None:
        if held.is_open:
            held.tree += self.memory.allocate(data.draw(st.integers(0, min(8, self.memory.num_available))))

    @rule(held=sessions, data=st.data())
    def commit(self, held: Held, data: st.DataObject) -> None:
        """Keep some of the tree's slots, in any order, and give the others back."""
        if not held.is_open or held.slots.num_cached < len(held.token_ids):
            return
        order = data.draw(st.permutations(held.tree))
        num_accepted = data.draw(st.integers(0, len(order)))
        held.token_ids += data.draw(st.lists(st.integers(0, 1), min_size=num_accepted, max_size=num_accepted))
        held.slots.append(order[:num_accepted])
        self.write(held, list(order[:num_accepted]))
        self.memory.free(order[num_accepted:])
        held.tree = []

    @rule(held=sessions)
    def share(self, held: Held) -> None:
        if held.is_open:
            held.slots.share(held.cached)

    @rule(held=sessions, data=st.data())
    def truncate(self, held: Held, data: st.DataObject) -> None:
        if held.is_open:
            held.slots.truncate(data.draw(st.integers(held.slots.num_shared, held.slots.num_cached)))

    @rule(held=sessions, times=st.integers(1, 3), is_kept=st.booleans())
    def release(self, held: Held, times: int, is_kept: bool) -> None:
        """Close, or (`is_kept`) preempt."""
        if not held.is_open:
            return
        self.memory.free(held.tree)
        held.tree = []
        for _ in range(times):
            held.slots.release()
        if not is_kept:
            held.is_open = False
            self.held.remove(held)

    @precondition(lambda self: self.held)
    @rule()
    def release_all(self) -> None:
        for held in list(self.held):
            self.release(held, 1, False)
        assert self.memory.num_used_slots == 0
        assert self.memory.num_available == NUM_SLOTS

    @rule()
    def all_of_what_is_available_can_be_had(self) -> None:
        slots = self.memory.allocate(self.memory.num_available)
        assert len(set(slots)) == len(slots)
        self.memory.free(slots)

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        own = [
            slot for held in self.held for slot in held.slots.by_position[held.slots.num_shared : held.slots.num_cached]
        ]
        own += [slot for held in self.held for slot in held.tree]
        shared = {slot for held in self.held for slot in held.slots.by_position[: held.slots.num_shared]}
        assert len(set(own)) == len(own)
        assert not shared.intersection(own)
        assert all(TRASH_SLOT < slot <= NUM_SLOTS for slot in {*own, *shared})
        # Slots of a prefix that was extended in place may be held beyond what the session itself uses.
        assert self.memory.num_used_slots >= len(own) + len(shared)
        assert self.memory.prefixes.num_slots - self.memory.prefixes.num_evictable + len(own) == (
            self.memory.num_used_slots
        )

    @invariant()
    def positions_point_at_what_was_computed_for_their_text(self) -> None:
        for held in self.held:
            by_position, num_cached = held.slots.by_position, held.slots.num_cached
            for position in range(num_cached):
                assert self.written[int(by_position[position])] == tuple(held.token_ids[: position + 1])
            assert (by_position[num_cached:] == TRASH_SLOT).all()
            assert len(by_position) % 128 == 0


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_a_full_memory_hands_out_every_slot_once() -> None:
    full = memory()
    session = SessionSlots(full)
    assert sorted(session.extend(NUM_SLOTS)) == list(range(1, NUM_SLOTS + 1))
    assert (full.num_used_slots, full.num_available) == (NUM_SLOTS, 0)
    with pytest.raises(AssertionError, match="allocation beyond what is available"):
        full.allocate(1)


def test_a_session_grows_beyond_its_first_block() -> None:
    large = memory(1000)
    session = SessionSlots(large)
    taken = [slot for count in (1, 127, 1, 300, 4) for slot in session.extend(count)]
    assert session.by_position[:433].tolist() == taken
    assert len(session.by_position) % 128 == 0
    assert (session.by_position[433:] == TRASH_SLOT).all()


def computed(memory: KvMemory, token_ids: list[int]) -> SessionSlots:
    session = SessionSlots(memory)
    session.extend(len(token_ids))
    session.share(token_ids)
    return session


def test_texts_that_begin_alike_share_slots_while_their_sessions_are_open() -> None:
    shared = memory()
    first = computed(shared, [1, 2, 3, 4, 5])
    second = SessionSlots(shared)
    assert second.take_prefix([1, 2, 3, 9, 9]) == 3
    assert second.by_position[:3].tolist() == first.by_position[:3].tolist()
    assert shared.num_used_slots == 5
    second.extend(2)
    second.share([1, 2, 3, 9, 9])
    first.release()
    assert shared.num_used_slots == 5
    assert shared.usage(1).num_cached_slots == 2
    third = SessionSlots(shared)
    assert third.take_prefix([1, 2, 3, 4, 5, 6]) == 5


def test_who_computed_the_same_at_the_same_time_ends_up_with_the_others_slots() -> None:
    shared = memory()
    first, second = SessionSlots(shared), SessionSlots(shared)
    first.extend(4)
    second.extend(4)
    first.share([1, 2, 3, 4])
    second.share([1, 2, 3, 4])
    assert first.by_position.tolist() == second.by_position.tolist()
    assert shared.num_used_slots == 4
    assert first.take_prefix([1, 2, 3, 4]) == second.take_prefix([1, 2, 3, 4]) == 0


def test_the_end_of_the_text_used_longest_ago_goes_first() -> None:
    shared = memory(12)
    for token_ids in ([1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 3, 3]):
        computed(shared, token_ids).release()
    SessionSlots(shared).take_prefix([2, 2, 2, 2])  # held from here on
    taken = shared.allocate(12 - 10 + 1)
    known = {first: SessionSlots(shared) for first in (0, 1, 3)}
    assert known[0].take_prefix([1, 1, 1, 1]) == 3
    assert known[1].take_prefix([1, 1, 3, 3]) == 4
    for session in known.values():
        session.release()
    taken += shared.allocate(5)
    assert shared.num_available == 0
    assert len(set(taken)) == 8
    assert known[3].take_prefix([1, 1]) == 0


def test_without_sharing_nothing_stays() -> None:
    alone = memory(shares_prefixes=False)
    session = computed(alone, [1, 2, 3])
    assert SessionSlots(alone).take_prefix([1, 2, 3]) == 0
    session.release()
    assert (alone.num_used_slots, alone.usage(0).num_cached_slots, alone.prefixes.num_slots) == (0, 0, 0)


def test_what_is_noted_of_prefixes_does_not_grow_with_their_use() -> None:
    shared = memory()
    computed(shared, [1, 2, 3]).release()
    for _ in range(2000):
        session = SessionSlots(shared)
        session.take_prefix([1, 2, 3])
        session.release()
    assert len(shared.prefixes._leaves) < 200
