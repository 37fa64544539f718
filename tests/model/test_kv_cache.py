from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, precondition, rule

from easyspec.errors import CapacityError
from easyspec.model.config import ModelConfig, load_config
from easyspec.model.kv_cache import TRASH_SLOT, KVPool, SessionSlots
from tests.fakes.checkpoints import write_checkpoint

CPU = torch.device("cpu")
NUM_SLOTS = 40
BLOCK_SIZE = 8
# The pool asks for no more of a configuration than its sizes.
CONFIG = ModelConfig(
    vocab_size=10,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=8,
    rms_norm_eps=1e-6,
    max_model_len=64,
    tie_word_embeddings=False,
    has_qk_norm=False,
    eos_token_ids=(),
    dtype=torch.float32,
    hf_config=None,
)


@dataclass(eq=False)
class Held:
    """A session and what it should hold, in a list."""

    slots: SessionSlots
    num_reserved: int
    cached: list[int] = field(default_factory=list)
    tree: list[int] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return self.num_reserved - len(self.cached) - len(self.tree)


class PoolMachine(RuleBasedStateMachine):
    """Sessions come, draft, commit, forget and go in any order; every slot has one owner at any time."""

    sessions: Bundle[Held] = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.pool = KVPool(CONFIG, NUM_SLOTS, CPU)
        self.held: list[Held] = []

    @rule(target=sessions, num_reserved=st.integers(1, NUM_SLOTS + 5))
    def open(self, num_reserved: int) -> object:
        num_promised = sum(held.num_reserved for held in self.held)
        if num_promised + num_reserved > NUM_SLOTS:
            with pytest.raises(CapacityError) as caught:
                SessionSlots(self.pool, num_reserved, BLOCK_SIZE)
            assert f"{num_reserved} token slots wanted, {NUM_SLOTS - num_promised} of {NUM_SLOTS}" in str(caught.value)
            return multiple()
        held = Held(SessionSlots(self.pool, num_reserved, BLOCK_SIZE), num_reserved)
        self.held.append(held)
        return held

    @rule(held=sessions, data=st.data())
    def extend(self, held: Held, data: st.DataObject) -> None:
        slots = held.slots.extend(data.draw(st.integers(0, held.num_left)))
        held.cached += slots

    @rule(held=sessions, data=st.data())
    def draft(self, held: Held, data: st.DataObject) -> None:
        held.tree += self.pool.allocate(data.draw(st.integers(0, held.num_left)))

    @rule(held=sessions, data=st.data())
    def commit(self, held: Held, data: st.DataObject) -> None:
        """Keep some of the tree's slots, in any order, and give the others back."""
        order = data.draw(st.permutations(held.tree))
        num_accepted = data.draw(st.integers(0, len(order)))
        held.slots.append(order[:num_accepted])
        self.pool.free(order[num_accepted:])
        held.cached += order[:num_accepted]
        held.tree = []

    @rule(held=sessions, data=st.data())
    def truncate(self, held: Held, data: st.DataObject) -> None:
        num_cached = data.draw(st.integers(0, len(held.cached)))
        held.slots.truncate(num_cached)
        del held.cached[num_cached:]

    @rule(held=sessions, times=st.integers(1, 3))
    def release(self, held: Held, times: int) -> None:
        if held in self.held:
            self.pool.free(held.tree)
            self.held.remove(held)
        for _ in range(times):
            held.slots.release()
        held.cached, held.tree, held.num_reserved = [], [], 0

    @precondition(lambda self: self.held)
    @rule()
    def release_all(self) -> None:
        for held in list(self.held):
            self.release(held, 1)
        assert self.pool.num_used_slots == self.pool.num_reserved_slots == 0

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        owned = [slot for held in self.held for slot in (*held.cached, *held.tree)]
        assert len(set(owned)) == len(owned)
        assert all(TRASH_SLOT < slot <= NUM_SLOTS for slot in owned)
        assert self.pool.num_used_slots == len(owned)
        assert self.pool.num_reserved_slots == sum(held.num_reserved for held in self.held)

    @invariant()
    def positions_point_at_their_slots(self) -> None:
        for held in self.held:
            by_position = held.slots.by_position
            assert held.slots.num_cached == len(held.cached)
            assert by_position[: len(held.cached)].tolist() == held.cached
            assert (by_position[len(held.cached) :] == TRASH_SLOT).all()
            assert len(by_position) % BLOCK_SIZE == 0
            assert len(by_position) >= held.num_reserved


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_full_pool_hands_out_every_slot_once() -> None:
    pool = KVPool(CONFIG, NUM_SLOTS, CPU)
    session = SessionSlots(pool, NUM_SLOTS, BLOCK_SIZE)
    assert sorted(session.extend(NUM_SLOTS)) == list(range(1, NUM_SLOTS + 1))
    assert pool.num_used_slots == NUM_SLOTS
    with pytest.raises(AssertionError, match="allocation beyond the reservation"):
        pool.allocate(1)


def test_a_refused_reservation_changes_nothing() -> None:
    pool = KVPool(CONFIG, NUM_SLOTS, CPU)
    first = SessionSlots(pool, 30, BLOCK_SIZE)
    taken = first.extend(20)
    with pytest.raises(CapacityError, match="KV memory is full: 11 token slots wanted, 10 of 40 free"):
        SessionSlots(pool, 11, BLOCK_SIZE)
    assert (pool.num_used_slots, pool.num_reserved_slots) == (20, 30)
    assert first.by_position[:20].tolist() == taken
    second = SessionSlots(pool, 10, BLOCK_SIZE)
    assert set(second.extend(10)).isdisjoint(first.extend(10) + taken)


def test_a_released_session_takes_no_promise_of_others_along() -> None:
    pool = KVPool(CONFIG, NUM_SLOTS, CPU)
    first, second = SessionSlots(pool, 20, BLOCK_SIZE), SessionSlots(pool, 20, BLOCK_SIZE)
    second.extend(3)
    for _ in range(3):
        first.release()
    assert (pool.num_used_slots, pool.num_reserved_slots) == (3, 20)


def test_entries_are_rows_of_layer_head_and_slot(tmp_path: Path) -> None:
    """Every layer, head and slot, the trash slot included, has a row of its own, and no other."""
    config = load_config(write_checkpoint(tmp_path, "qwen3", head_dim=32))
    pool = KVPool(config, 11, CPU)
    entries = pool.entries(torch.arange(12))
    num_planes = config.num_layers * config.num_kv_heads
    assert entries.shape == (num_planes, 12)
    assert np.array_equal(np.sort(entries.numpy(), axis=None), np.arange(num_planes * 12))
    assert pool.table.shape == (num_planes * 12, 2 * 32 + 1)
    assert torch.equal(pool.table[:, -1], torch.ones(num_planes * 12))
    assert torch.equal(pool.entries(torch.tensor([7, 0, 7])), entries[:, [7, 0, 7]])
