"""EasySpec's drafter (arXiv 2502.02493): fuzzy, layer-parallel steps between exact calibrations.

A round: drop the fuzzy KV entries of the last tree, run one exact, layer-sequential pass over the accepted and
bonus tokens (bonus calibration), whose last row yields the first level; then one fuzzy step per further level.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from drafter_service.growth import (
    DEFAULT_RANKING,
    Candidates,
    GrowingTree,
    RankingSettings,
    RoundNoise,
    Sharpness,
    rank_candidates,
)
from drafter_service.sources.source import DraftJob, DraftSession, Proposal
from easyspec.model.decoder import Decoder
from easyspec.model.kv_cache import KVPool, SessionSlots
from easyspec.model.row_layout import BLOCK_SIZE, Segment, TreeColumns
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.messages import DraftTimings

# Children looked at per row: the chance that the base model picks a later one is small. The same number for every
# session, so that a node's value does not depend on the budgets of others in the batch.
_NUM_CANDIDATES = 8
# Up to this many tokens noise is drawn for all of them, once a round; beyond, for the likeliest of each row.
_MAX_NOISED_VOCABULARY = 8192


class _SessionState:
    """A session's KV: slots of committed tokens, and of the last tree's expanded nodes (row -> slot)."""

    def __init__(self, slots: SessionSlots, ranking: RankingSettings) -> None:
        self.slots = slots
        self.sharpness = Sharpness(ranking)
        self.tree: GrowingTree | None = None
        self.tree_slots: dict[int, int] = {}


@dataclass
class _Drafting:
    """A job while it is being worked on."""

    job: DraftJob
    state: _SessionState
    tree: GrowingTree

    @property
    def base_length(self) -> int:
        return len(self.job.session.token_ids)


class LayerParallelSource:
    """Guesses with the draft model. Jobs of one plan share every pass."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        prefill_chunk: int,
        max_tree_slots: int,
        ranking: RankingSettings = DEFAULT_RANKING,
    ) -> None:
        self._ranking = ranking
        self._decoder = decoder
        self._pool = pool
        self._prefill_chunk = prefill_chunk
        self._max_tree_slots = max_tree_slots
        self._states: dict[int, _SessionState] = {}

    def open(self, session: DraftSession) -> None:
        """Reserve KV memory for the session; raises CapacityError."""
        slots = SessionSlots(self._pool, session.max_length + self._max_tree_slots, BLOCK_SIZE)
        self._states[session.session_id] = _SessionState(slots, self._ranking)

    def close(self, session: DraftSession) -> None:
        """Free the session's KV memory; idempotent."""
        state = self._states.pop(session.session_id, None)
        if state is not None:
            self._pool.free([*state.tree_slots.values()])
            state.slots.release()

    def prepare(self, session: DraftSession) -> bool:
        """Prefill one chunk, exactly; the last token is left to the calibration, which needs a row."""
        state = self._states[session.session_id]
        num_left = len(session.token_ids) - 1 - state.slots.num_cached
        if num_left > 0:
            segment = _chain_segment(session, state, min(self._prefill_chunk, num_left))
            self._decoder.forward(self._decoder.lay_out([segment]), self._pool)
        return num_left <= self._prefill_chunk

    def propose(self, jobs: Sequence[DraftJob]) -> list[Proposal]:
        """One calibration pass and one fuzzy step per further level for each set of jobs with the same plan."""
        by_plan: dict[tuple[LayerPlan, bool], list[int]] = {}
        for index, job in enumerate(jobs):
            by_plan.setdefault((job.session.plan, job.session.calibration), []).append(index)
        proposals: dict[int, Proposal] = {}
        for (plan, calibration), indexes in by_plan.items():
            group = [jobs[index] for index in indexes]
            proposals.update(zip(indexes, self._propose(group, plan, calibration), strict=True))
        return [proposals[index] for index in range(len(jobs))]

    def _propose(self, jobs: Sequence[DraftJob], plan: LayerPlan, calibration: bool) -> list[Proposal]:
        started_ns = time.monotonic_ns()
        draftings = [self._begin(job) for job in jobs]
        draft_logits = self._calibrate(draftings, self._decoder.sequential_plan if calibration else plan)
        noise = self._draw_noise(draftings)
        self._add_level(draftings, draft_logits, noise)
        calibrated_ns = time.monotonic_ns()
        num_fuzzy_steps = 0
        while active := [drafting for drafting in draftings if drafting.tree.frontier]:
            self._add_level(active, self._fuzzy_step(active, plan), noise)
            num_fuzzy_steps += 1
        timings = DraftTimings(
            calibrate_ns=calibrated_ns - started_ns,
            fuzzy_ns=time.monotonic_ns() - calibrated_ns,
            num_fuzzy_steps=num_fuzzy_steps,
        )
        return [Proposal(drafting.tree.scored(), timings) for drafting in draftings]

    def _begin(self, job: DraftJob) -> _Drafting:
        """Learn from the verdict and drop the last tree; without calibration its accepted entries stay."""
        session = job.session
        state = self._states[session.session_id]
        kept: list[int] = []
        if state.tree is not None:
            new_tokens = session.token_ids[len(session.token_ids) - job.num_new_tokens :]
            kept = _learn(state, new_tokens)
        if session.calibration:
            kept = []
        kept_slots = [state.tree_slots.pop(row) for row in kept[: job.num_new_tokens - 1]]  # the bonus token has none
        self._pool.free([*state.tree_slots.values()])
        state.slots.append(kept_slots)
        state.tree_slots = {}
        state.tree = GrowingTree(job.budget, state.sharpness)
        return _Drafting(job, state, state.tree)

    def _calibrate(self, draftings: Sequence[_Drafting], plan: LayerPlan) -> torch.Tensor:
        """Exact pass over every committed token without exact KV: logits of the last rows [B, V]."""
        segments = [
            _chain_segment(drafting.job.session, drafting.state, drafting.base_length - drafting.state.slots.num_cached)
            for drafting in draftings
        ]
        layout = self._decoder.lay_out(segments)
        hidden = self._decoder.forward(layout, self._pool, plan)
        last_rows = [layout.flat_row(index, len(segment) - 1) for index, segment in enumerate(segments)]
        return self._decoder.logits(hidden[torch.tensor(last_rows, device=hidden.device)])

    def _fuzzy_step(self, draftings: Sequence[_Drafting], plan: LayerPlan) -> torch.Tensor:
        """One pass over the frontiers: logits of all their rows, in order."""
        segments = [self._frontier_segment(drafting) for drafting in draftings]
        layout = self._decoder.lay_out(segments)
        hidden = self._decoder.forward(layout, self._pool, plan)
        rows = [layout.flat_row(index, row) for index, segment in enumerate(segments) for row in range(len(segment))]
        return self._decoder.logits(hidden[torch.tensor(rows, device=hidden.device)])

    def _frontier_segment(self, drafting: _Drafting) -> Segment:
        """Rows for the nodes to expand; each sees the committed text, its expanded ancestors and itself."""
        tree, state = drafting.tree, drafting.state
        taken = self._pool.allocate(len(tree.frontier))
        state.tree_slots.update(zip(tree.frontier, taken, strict=True))
        expanded = list(state.tree_slots)  # parents first
        column_of_row = {row: column for column, row in enumerate(expanded)}
        visible = np.zeros((len(tree.frontier), len(expanded)), dtype=np.bool_)
        for index, row in enumerate(tree.frontier):
            ancestor = row
            while ancestor > 0:
                visible[index, column_of_row[ancestor]] = True
                ancestor = tree.parent_rows[ancestor - 1]
        root_position = drafting.base_length - 1
        slots = [state.tree_slots[row] for row in expanded]
        return Segment(
            token_ids=[tree.token_ids[row - 1] for row in tree.frontier],
            positions=[root_position + tree.depths[row] for row in tree.frontier],
            slots=taken,
            num_visible=[drafting.base_length] * len(tree.frontier),
            slots_by_position=state.slots.by_position,
            tree=TreeColumns(slots, [root_position + tree.depths[row] for row in expanded], visible),
        )

    def _draw_noise(self, draftings: Sequence[_Drafting]) -> RoundNoise | None:
        """The round's noise, if anybody samples and the vocabulary is small enough to draw all of it."""
        sampled = [drafting for drafting in draftings if not drafting.job.session.sampling.is_greedy]
        vocab_size = self._decoder.config.vocab_size
        if not sampled or vocab_size > _MAX_NOISED_VOCABULARY:
            return None
        return RoundNoise(
            [drafting.job.session.sampling for drafting in sampled],
            [drafting.base_length for drafting in sampled],
            [drafting.job.budget.num_levels for drafting in sampled],
            vocab_size,
            self._decoder.device,
        )

    def _add_level(self, draftings: Sequence[_Drafting], draft_logits: torch.Tensor, noise: RoundNoise | None) -> None:
        """Rank the candidates of every frontier row, in the order of `draft_logits` [rows, V]."""
        positions: list[int] = []
        samplings = []
        for drafting in draftings:
            tree = drafting.tree
            positions += [drafting.base_length + tree.depths[row] for row in tree.frontier]
            samplings += [drafting.job.session.sampling] * len(tree.frontier)
        candidates = rank_candidates(draft_logits, positions, samplings, _NUM_CANDIDATES, noise)
        for drafting in draftings:
            count = len(drafting.tree.frontier)
            drafting.tree.add_level(candidates[:count])
            candidates = candidates[count:]


def _chain_segment(session: DraftSession, state: _SessionState, num_tokens: int) -> Segment:
    """Rows for the next committed tokens without KV."""
    start = state.slots.num_cached
    positions = range(start, start + num_tokens)
    slots = state.slots.extend(num_tokens)
    visible = [position + 1 for position in positions]
    return Segment(session.token_ids[start : start + num_tokens], positions, slots, visible, state.slots.by_position)


def _learn(state: _SessionState, new_tokens: Sequence[int]) -> list[int]:
    """Walk the last tree along the tokens that were chosen: fit the sharpness, return the expanded rows passed."""
    tree = state.tree
    assert tree is not None, "there was a tree"
    passed: list[int] = []
    row: int | None = 0
    for token_id in new_tokens:
        candidates: Candidates | None = tree.expanded.get(row) if row is not None else None
        if candidates is None:
            break
        state.sharpness.observe(candidates, token_id)
        row = next(
            (
                child + 1
                for child, parent_row in enumerate(tree.parent_rows)
                if parent_row == row and tree.token_ids[child] == token_id
            ),
            None,
        )
        if row is None or row not in state.tree_slots:
            break
        passed.append(row)
    return passed
