"""What the draft model holds of one session: KV, the tree that grows, and how far the round has come."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from drafter_service.model.exit_state import ExitState
from drafter_service.model.growth import LevelTree, Sharpness
from drafter_service.model.vocabulary_bridge import VocabularyBridge
from drafter_service.request import DraftRequest
from easyspec.engine.segments import committed_segment
from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.model.row_layout import Segment
from easyspec.speculation.growing_tree import follow
from easyspec.speculation.messages import DraftTimings
from easyspec.speculation.parameters import TreeBudget


class TakenAhead(Protocol):
    """What a session drafts ahead (`drafter_service/model/ahead.py`)."""

    def take_up(self, state: ModelState, said: Sequence[int], budget: TreeBudget) -> None:
        """Move into the session what the verdict `said` made true of it, and free the rest."""

    def drop(self) -> None:
        """Free it; idempotent."""


class ModelState:
    """Slots of committed tokens, and of the last tree's expanded nodes (row -> slot).

    `token_ids` are the session's committed tokens, which it alone extends. The first `num_exact` cached ones have exact
    K and V in all layers, which others may share. `exits` is there where levels may leave the model early, `bridge`
    where the draft model's vocabulary is not the base's. `served_at` orders those whose prompts are read; while it
    `is_in_pass`, cached positions may be half written. A level must be expected to bring `least_gain` tokens. While a
    round is under way, `timings` are those of the passes that its tree took part in.
    """

    takes_prefixes = True

    def __init__(
        self,
        request: DraftRequest,
        token_ids: list[int],
        memory: KvMemory,
        sharpness: Sharpness,
        exits: ExitState | None = None,
        bridge: VocabularyBridge | None = None,
    ) -> None:
        self.request = request
        self.token_ids = token_ids
        self.bridge = bridge
        self.exits = exits
        self.slots = SessionSlots(memory)
        self.num_prompt_tokens = len(token_ids)
        self.num_exact = 0
        self.served_at = 0
        self.is_in_pass = False
        self.least_gain = 0.0
        self.ahead: TakenAhead | None = None
        self.sharpness = sharpness
        self.tree: LevelTree | None = None
        self.tree_slots: dict[int, int] = {}
        self.timings: DraftTimings | None = None
        self._memory = memory
        self._base_length = len(token_ids)  # that the tree stands on

    @property
    def growing(self) -> LevelTree:
        """The tree of the round under way."""
        assert self.tree is not None, "a round is under way"
        return self.tree

    @property
    def said_since(self) -> list[int]:
        """Tokens committed since the last tree began, of which it may have guessed some."""
        return self.token_ids[self._base_length :]

    @property
    def num_uncached(self) -> int:
        """Committed tokens without K and V."""
        return len(self.token_ids) - self.slots.num_cached

    @property
    def num_unread(self) -> int:
        """Prompt tokens to prefill; the last one is left to the first calibration, which needs a row."""
        return self.num_prompt_tokens - 1 - self.slots.num_cached

    @property
    def is_done(self) -> bool:
        """Whether the tree of a round has grown."""
        return self.timings is not None and not self.growing.frontier

    def take_prefix(self) -> int:
        """Hold what is known of the prompt; returns how many tokens that adds."""
        num_new = self.slots.take_prefix(self.token_ids, self.num_prompt_tokens - 1)
        self.num_exact = self.slots.num_cached
        return num_new

    def begin(self, budget: TreeBudget) -> None:
        """Learn from the verdict and drop the last tree; without calibration its accepted entries stay."""
        said = self.said_since
        passed: list[int] = []  # expanded rows that the verdict went through
        for row, token_id, child in follow(self.tree, said) if self.tree is not None else ():
            if row not in self.growing.expanded:
                break
            self.sharpness.observe(self.growing.expanded[row], token_id)
            if child is None or child not in self.tree_slots:
                break
            passed.append(child)
        kept = [] if self.request.calibration else passed
        if (exits := self.exits) is not None:
            kept = [] if exits.num_waiting else [*itertools.takewhile(lambda row: row not in exits.nodes, kept)]
            exits.begin_round(max(1, budget.num_nodes // budget.num_levels))
        # Before the prompt is read there is nothing they could stand on. The bonus token has no slot.
        kept_slots = [self.tree_slots.pop(row) for row in kept[: len(said) - 1]]
        self.drop_tree()
        self.slots.append(kept_slots)
        self.tree = LevelTree(budget, self.sharpness, self.least_gain)
        self._base_length = len(self.token_ids)
        self.timings = DraftTimings()

    def add_time(self, elapsed_ns: int, *, is_fuzzy: bool) -> None:
        """A pass of the round has taken so long: a fuzzy step, or a calibration."""
        if (spent := self.timings) is None:
            return
        if is_fuzzy:
            num_steps = spent.num_fuzzy_steps + 1
            self.timings = replace(spent, fuzzy_ns=spent.fuzzy_ns + elapsed_ns, num_fuzzy_steps=num_steps)
        else:
            self.timings = replace(spent, calibrate_ns=spent.calibrate_ns + elapsed_ns)

    def drop_tree(self) -> None:
        """Free the slots of the last tree."""
        self._memory.free([*self.tree_slots.values()])
        self.tree_slots = {}

    def drop_ahead(self) -> None:
        """Free what is drafted ahead."""
        if self.ahead is not None:
            self.ahead.drop()
            self.ahead = None

    def branch(self, token_ids: Sequence[int], slots: Sequence[int]) -> ModelState:
        """The session as it would be after some more tokens, of which those in `slots` are, or will be, cached.

        Slots that it shares with the session are not its own to free.
        """
        branch = ModelState(
            self.request, [*self.token_ids, *token_ids], self._memory, self.sharpness, None, self.bridge
        )
        branch.slots.append(self.slots.by_position[: self.slots.num_cached].tolist())
        branch.slots.append(slots)
        return branch

    def close(self) -> None:
        """Free all slots, of which exact entries stay as a prefix for others."""
        self.share()
        self.give_up()

    def give_up(self) -> None:
        """Free all slots and share nothing of them."""
        self.drop_ahead()
        self.drop_tree()
        self.slots.release()

    def share(self) -> None:
        """Let other sessions use what is cached, if all of it is exact."""
        if self.exits is not None and self.request.calibration:
            # Called when the prompt has been read, which is exact in all layers, and at the end of the session.
            self.slots.truncate(self.num_exact)
        if self.slots.num_cached == self.num_exact:
            self.slots.share(self.token_ids)

    def take_chain(self, num_tokens: int) -> Segment:
        """Rows for the next committed tokens, which get slots."""
        num_cached = self.slots.num_cached
        self.slots.extend(num_tokens)
        return self.committed_segment(range(num_cached, num_cached + num_tokens))

    def committed_segment(self, positions: range) -> Segment:
        """Rows for cached tokens."""
        token_ids = self._read_token_ids(self.token_ids[positions.start : positions.stop])
        return committed_segment(token_ids, self.slots, positions)

    def take_frontier(self) -> Segment:
        """Rows for the nodes to expand, which get slots."""
        rows = self.growing.frontier
        self.tree_slots.update(zip(rows, self._memory.allocate(len(rows)), strict=True))
        return self.node_segment(rows)

    def node_segment(self, rows: Sequence[int]) -> Segment:
        """Rows for nodes that have slots. Each sees the committed text, its expanded ancestors and itself."""
        tree, base_length = self.growing, len(self.token_ids)
        paths: dict[int, Sequence[int]] = {}
        for row, slot in self.tree_slots.items():  # parents first
            paths[row] = [*paths.get(tree.parent_rows[row - 1], ()), slot]
        return Segment(
            token_ids=self._read_token_ids([tree.token_ids[row - 1] for row in rows]),
            positions=[base_length - 1 + tree.depths[row] for row in rows],
            slots=[self.tree_slots[row] for row in rows],
            num_visible=[base_length] * len(rows),
            slots_by_position=self.slots.by_position,
            paths=[paths[row] for row in rows],
        )

    def _read_token_ids(self, token_ids: Sequence[int]) -> Sequence[int]:
        """What the draft model reads for these tokens."""
        return token_ids if self.bridge is None else self.bridge.to_draft(token_ids)
