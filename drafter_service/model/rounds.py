"""A session's KV at the drafter, and its round while it is being worked on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from drafter_service.early_exit.exit_state import ExitState
from drafter_service.model.growth import Candidates, GrowingTree, RankingSettings, Sharpness
from drafter_service.model.vocabulary_bridge import VocabularyBridge
from drafter_service.source import DraftJob, DraftSession
from easyspec.engine.segments import committed_segment, visible_nodes
from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.model.row_layout import Segment, TreeColumns


class SessionState:
    """Slots of committed tokens, and of the last tree's expanded nodes (row -> slot).

    The first `num_exact` cached tokens have exact K and V in all layers, which others may share. `exits` is there
    where levels may leave the model early, `bridge` where the draft model's vocabulary is not the base's.
    """

    def __init__(
        self,
        session: DraftSession,
        memory: KvMemory,
        ranking: RankingSettings,
        exits: ExitState | None = None,
        bridge: VocabularyBridge | None = None,
    ) -> None:
        self.session = session
        self.takes_prefixes = True
        self.bridge = bridge
        self.exits = exits
        self.slots = SessionSlots(memory)
        self.num_prompt_tokens = len(session.token_ids)
        self.num_exact = 0
        self.sharpness = Sharpness(ranking)
        self.tree: GrowingTree | None = None
        self.tree_slots: dict[int, int] = {}
        self.drafting: Drafting | None = None
        self._memory = memory

    @property
    def token_ids(self) -> list[int]:
        """The committed tokens."""
        return self.session.token_ids

    @property
    def num_uncached(self) -> int:
        """Committed tokens without K and V."""
        return len(self.session.token_ids) - self.slots.num_cached

    @property
    def num_unread(self) -> int:
        """Prompt tokens to prefill; the last one is left to the first calibration, which needs a row."""
        return self.num_prompt_tokens - 1 - self.slots.num_cached

    def begin(self, job: DraftJob) -> None:
        """Learn from the verdict and drop the last tree; without calibration its accepted entries stay."""
        kept: list[int] = []
        if self.tree is not None:
            kept = self._learn(job.session.token_ids[len(job.session.token_ids) - job.num_new_tokens :])
        if job.session.calibration:
            kept = []
        if self.exits is not None:
            kept = [*itertools.takewhile(self.exits.is_whole, kept)] if not self.exits.num_waiting else []
            self.exits.begin_round(max(1, job.budget.num_nodes // job.budget.num_levels))
        # Before the prompt is read there is nothing they could stand on. The bonus token has no slot.
        kept_slots = [self.tree_slots.pop(row) for row in kept[: job.num_new_tokens - 1]]
        self.drop_tree()
        self.slots.append(kept_slots)
        self.tree = GrowingTree(job.budget, self.sharpness)
        self.drafting = Drafting(job, self, self.tree)

    def drop_tree(self) -> None:
        self._memory.free([*self.tree_slots.values()])
        self.tree_slots = {}

    def share(self) -> None:
        """Let other sessions use what is cached, if all of it is exact."""
        if self.exits is not None and self.session.calibration:
            # Called when the prompt has been read, which is exact in all layers, and at the end of the session.
            self.slots.truncate(self.num_exact)
        if self.slots.num_cached == self.num_exact:
            self.slots.share(self.session.token_ids[: self.num_exact])

    def chain_segment(self, slots: Sequence[int]) -> Segment:
        """Rows for the last cached tokens, which live in `slots`."""
        return self.committed_segment(range(self.slots.num_cached - len(slots), self.slots.num_cached))

    def committed_segment(self, positions: range) -> Segment:
        """Rows for cached tokens."""
        token_ids = self.read_token_ids(self.session.token_ids[positions.start : positions.stop])
        return committed_segment(token_ids, self.slots, positions)

    def read_token_ids(self, token_ids: Sequence[int]) -> Sequence[int]:
        """What the draft model reads for these tokens."""
        return token_ids if self.bridge is None else self.bridge.to_draft(token_ids)

    def _learn(self, new_tokens: Sequence[int]) -> list[int]:
        """Walk the last tree along the chosen tokens: fit the sharpness, return the expanded rows passed."""
        tree = self.tree
        assert tree is not None, "there was a tree"
        passed: list[int] = []
        row: int | None = 0
        for token_id in new_tokens:
            candidates: Candidates | None = tree.expanded.get(row) if row is not None else None
            if candidates is None:
                break
            self.sharpness.observe(candidates, token_id)
            row = next(
                (
                    child + 1
                    for child, parent_row in enumerate(tree.parent_rows)
                    if parent_row == row and tree.token_ids[child] == token_id
                ),
                None,
            )
            if row is None or row not in self.tree_slots:
                break
            passed.append(row)
        return passed


@dataclass
class Drafting:
    """A job while it is being worked on. The times are those of the passes it took part in."""

    job: DraftJob
    state: SessionState
    tree: GrowingTree
    is_calibrated: bool = False
    calibrate_ns: int = 0
    fuzzy_ns: int = 0
    num_fuzzy_steps: int = 0

    @property
    def base_length(self) -> int:
        return len(self.job.session.token_ids)

    @property
    def level(self) -> int:
        """Depth of the nodes to expand next; the root's is 0."""
        return self.tree.depths[self.tree.frontier[0]]

    def frontier_segment(self, slots: Sequence[int]) -> Segment:
        """Rows for the nodes to expand, whose K and V go to `slots`."""
        self.state.tree_slots.update(zip(self.tree.frontier, slots, strict=True))
        return self.node_segment(self.tree.frontier)

    def node_segment(self, rows: Sequence[int]) -> Segment:
        """Rows for nodes that have slots. Each sees the committed text, its expanded ancestors and itself."""
        tree, state = self.tree, self.state
        expanded = list(state.tree_slots)  # parents first
        column_of_row = {row: column for column, row in enumerate(expanded)}
        visible = visible_nodes([column_of_row.get(tree.parent_rows[row - 1]) for row in expanded])
        root_position = self.base_length - 1
        return Segment(
            token_ids=state.read_token_ids([tree.token_ids[row - 1] for row in rows]),
            positions=[root_position + tree.depths[row] for row in rows],
            slots=[state.tree_slots[row] for row in rows],
            num_visible=[self.base_length] * len(rows),
            slots_by_position=state.slots.by_position,
            tree=TreeColumns(
                [state.tree_slots[row] for row in expanded],
                [root_position + tree.depths[row] for row in expanded],
                visible[[column_of_row[row] for row in rows]],
            ),
        )
