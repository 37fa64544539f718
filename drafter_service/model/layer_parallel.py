"""EasySpec's drafter (arXiv 2502.02493): fuzzy, layer-parallel steps between exact calibrations.

A round: drop the fuzzy KV entries of the last tree, run one exact, layer-sequential pass over the accepted and
bonus tokens (bonus calibration), whose last row yields the first level; then one fuzzy step per further level.

Sessions share every pass and need not be in step: each of our steps calibrates who has come, reads a piece of the
prompts, and grows every tree by a level. Who comes late joins at the next level.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from drafter_service.early_exit.exit_state import ExitState
from drafter_service.early_exit.exits import EarlyExits
from drafter_service.early_exit.gate import ExitGate, LearnedGate
from drafter_service.model.growth import DEFAULT_RANKING, RankingSettings
from drafter_service.model.level_ranking import rank_level
from drafter_service.model.rounds import Drafting, SessionState
from drafter_service.model.vocabulary_bridge import VocabularyBridge
from drafter_service.source import DraftJob, DraftSession, Progress, Proposal
from easyspec.engine.prefill_pace import PrefillPace
from easyspec.engine.prompt_shares import served_readers, share_out
from easyspec.engine.room import make_room
from easyspec.errors import CapacityError
from easyspec.model.decoder import Decoder
from easyspec.model.kv_cache import KvMemory
from easyspec.model.row_layout import Segment, lay_out
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.messages import DraftTimings
from easyspec.speculation.sources import DraftSources

# Who had a tree so recently will soon come for the next one, and would wait for a long step.
_DRAFTING_WITHIN_NS = 1_000_000_000

_ItemT = TypeVar("_ItemT")
_PlanT = TypeVar("_PlanT")


@dataclass(frozen=True)
class _Chain:
    """Committed tokens to compute: a piece of a prompt, or (with a drafting) all that a calibration covers."""

    state: SessionState
    segment: Segment
    drafting: Drafting | None


@dataclass(frozen=True)
class _Frontier:
    """Nodes of a tree to expand."""

    drafting: Drafting
    segment: Segment


class LayerParallelSource:
    """Guesses with the draft model. Sessions of one plan share every pass.

    A session takes slots as it grows; when there are none left, the youngest loses its own, and is over: its gateway
    decodes plainly and comes back later.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: KvMemory,
        prefill_chunk: int,
        max_tree_slots: int,
        ranking: RankingSettings = DEFAULT_RANKING,
        max_prefill_slowdown: float = 1.7,
        gate: ExitGate | None = None,
        max_batch_rows: int = 512,
        bridge: VocabularyBridge | None = None,
    ) -> None:
        self._ranking = ranking
        self._bridge = bridge
        self._max_batch_rows = max_batch_rows
        self._decoder = decoder
        self._early_exits = EarlyExits(decoder, memory.pool, gate or LearnedGate(), max_batch_rows)
        self._memory = memory
        self._max_tree_slots = max_tree_slots
        self._pace = PrefillPace(max_prefill_slowdown, prefill_chunk)
        self._states: dict[int, SessionState] = {}  # in the order of their age
        self._unread: list[SessionState] = []  # prompts to prefill, least recently served first
        self._evicted: list[DraftSession] = []
        self._last_job_ns = -_DRAFTING_WITHIN_NS

    def open(self, session: DraftSession) -> None:
        """Let the session in if there is room for its prompt and a tree; raises CapacityError."""
        state = SessionState(session, self._memory, self._ranking, self._exit_state(session), self._bridge)
        num_hit = state.slots.take_prefix(session.token_ids[:-1])
        state.num_exact = state.slots.num_cached
        wanted = state.num_uncached + self._max_tree_slots
        if self._states and wanted > self._memory.num_available:
            state.slots.release()
            raise CapacityError(
                f"KV memory is full: {wanted} token slots wanted, {self._memory.num_available} of "
                f"{self._memory.num_slots} free"
            )
        self._memory.num_query_tokens += len(session.token_ids) - 1
        self._memory.num_hit_tokens += num_hit
        self._states[session.session_id] = state
        if state.num_unread > 0:
            self._unread.append(state)

    def _exit_state(self, session: DraftSession) -> ExitState | None:
        """Where the session's levels may leave: at early exits, and after the last layer if the model is asked too."""
        config = self._decoder.config
        if DraftSources.EARLY_EXIT not in session.sources:
            return None
        assert config.early_exits, "sessions ask for sources that are here"
        is_whole_asked = DraftSources.MODEL in session.sources
        return ExitState([*config.early_exits, *([config.num_layers] if is_whole_asked else [])])

    def close(self, session: DraftSession) -> None:
        """Free the session's KV memory, of which exact entries stay as a prefix for others; idempotent."""
        state = self._forget(session)
        if state is not None:
            state.share()
            state.slots.release()

    def abandon(self) -> Sequence[DraftSession]:
        """End the sessions that had something to do, and share nothing of them."""
        busy = [state for state in self._states.values() if state.drafting is not None or state in self._unread]
        for state in busy:
            self._forget(state.session)
            state.slots.release()
        return [state.session for state in busy]

    def begin(self, job: DraftJob) -> None:
        """Learn from the verdict and drop the last tree; the next step calibrates."""
        state = self._states[job.session.session_id]
        if state.exits is not None:
            self._early_exits.begin(state, job)
        state.begin(job)

    def step(self) -> Progress:
        """Calibrate who has come, beside pieces of prompts; then one level for every tree that is not full."""
        with torch.inference_mode():
            return self._step()

    def _step(self) -> Progress:
        started_ns = time.monotonic_ns()
        chains = self._chains()
        early = [chain for chain in chains if _may_leave(chain)]
        for plan, members in _by_plan([chain for chain in chains if not _may_leave(chain)], self._plan_of_chain):
            self._run_chains(members, plan)
        for plan, members in _by_plan(early, self._plan_of_chain):
            self._calibrate_early(members, plan)
        num_chain_rows = sum(len(chain.segment) for chain in chains if chain.drafting is not None)
        num_prompt_rows = sum(len(chain.segment) for chain in chains if chain.drafting is None)
        growing = [drafting for drafting in self._draftings() if drafting.is_calibrated and drafting.tree.frontier]
        # Who is nearest to its end goes first, and makes room.
        nearest = sorted(growing, key=lambda drafting: -drafting.level)
        grown = _fitting(nearest, lambda drafting: len(drafting.tree.frontier), self._max_batch_rows)
        frontiers = [frontier for drafting in grown if (frontier := self._frontier(drafting)) is not None]
        for (plan, is_early), group in _by_plan(frontiers, _way_of_frontier):
            if is_early:
                self._early_exits.grow([(frontier.drafting, frontier.segment) for frontier in group], plan)
            else:
                self._grow(group, plan)
        if chains or frontiers:
            num_rows = num_chain_rows + sum(len(frontier.segment) for frontier in frontiers)
            self._pace.observe(num_rows, num_prompt_rows, time.monotonic_ns() - started_ns)
        evicted, self._evicted = self._evicted, []
        proposals = [self._finish(drafting) for drafting in self._draftings() if _is_finished(drafting)]
        return Progress(proposals, evicted, has_more=bool(self._unread or self._draftings()))

    def _draftings(self) -> list[Drafting]:
        return [state.drafting for state in self._states.values() if state.drafting is not None]

    def _forget(self, session: DraftSession) -> SessionState | None:
        state = self._states.pop(session.session_id, None)
        if state is not None:
            state.drop_tree()
            state.drafting = None
            self._unread = [other for other in self._unread if other is not state]
        return state

    def _chains(self) -> list[_Chain]:
        """This step's calibrations and pieces of prompts, with their slots."""
        waiting = [drafting for drafting in self._draftings() if not drafting.is_calibrated]
        ready = _fitting(
            [drafting for drafting in waiting if drafting.state.num_unread <= 0],
            lambda drafting: drafting.state.num_uncached,
            self._max_batch_rows,
        )
        wanted: dict[int, tuple[SessionState, int, Drafting | None]] = {
            drafting.job.session.session_id: (drafting.state, drafting.state.num_uncached, drafting)
            for drafting in ready
        }
        num_rows = sum(num_tokens for _, num_tokens, _ in wanted.values())
        for state, num_tokens in self._prompt_shares(num_rows):
            wanted[state.session.session_id] = (state, num_tokens, None)
        chains: list[_Chain] = []
        for session_id, (state, num_tokens, drafting) in sorted(wanted.items()):
            if session_id in self._states and self._make_room(num_tokens, state):
                chains.append(_Chain(state, state.chain_segment(state.slots.extend(num_tokens)), drafting))
        return chains

    def _prompt_shares(self, num_other_rows: int) -> list[tuple[SessionState, int]]:
        """Pieces of prompts for a step: fair shares, first for those who waited longest; short ones leave the rest."""
        for state in self._unread:
            self._memory.num_hit_tokens += state.slots.take_prefix(
                state.session.token_ids[: state.num_prompt_tokens - 1]
            )
            state.num_exact = state.slots.num_cached
        self._unread = [state for state in self._unread if state.num_unread > 0]
        if not self._unread:
            return []
        is_anyone_drafting = bool(self._draftings()) or time.monotonic_ns() - self._last_job_ns < _DRAFTING_WITHIN_NS
        num_rows = self._pace.num_prompt_rows(num_other_rows, is_anyone_decoding=is_anyone_drafting)
        served = served_readers(self._unread, self._memory, num_rows)
        self._unread = [state for state in self._unread if state not in served] + served
        shares: list[tuple[SessionState, int]] = []

        def give(state: SessionState, num_tokens: int) -> int:
            if num_tokens > 0:
                shares.append((state, num_tokens))
            return num_tokens

        share_out(served, num_rows, lambda state: state.num_unread, give)
        return shares

    def _plan_of_chain(self, chain: _Chain) -> LayerPlan:
        """Exact, but for the ablation that keeps fuzzy entries."""
        is_exact = chain.drafting is None or chain.state.session.calibration
        return self._decoder.sequential_plan if is_exact else chain.state.session.plan

    def _run_chains(self, chains: Sequence[_Chain], plan: LayerPlan) -> None:
        """Exact pass over committed tokens without exact KV; the last row of a calibration gives the first level."""
        started_ns = time.monotonic_ns()
        layout = lay_out([chain.segment for chain in chains])
        calibrated = [
            (chain.drafting, layout.flat_row(index, len(chain.segment) - 1))
            for index, chain in enumerate(chains)
            if chain.drafting is not None
        ]
        rows = [row for _, row in calibrated]
        result = self._decoder.forward(layout, self._memory.pool, plan, rows)
        if calibrated:
            draftings = [drafting for drafting, _ in calibrated]
            self._add_level(draftings, result.logits)
        elapsed_ns = time.monotonic_ns() - started_ns
        for chain in chains:
            is_unbroken = chain.state.num_exact + len(chain.segment) == chain.state.slots.num_cached
            if is_unbroken and plan == self._decoder.sequential_plan:
                chain.state.num_exact = chain.state.slots.num_cached
            if chain.drafting is None:
                chain.state.share()
            else:
                chain.drafting.is_calibrated = True
                chain.drafting.calibrate_ns += elapsed_ns

    def _calibrate_early(self, chains: Sequence[_Chain], plan: LayerPlan) -> None:
        calibrations = [(chain.drafting, chain.segment) for chain in chains if chain.drafting is not None]
        self._early_exits.calibrate(calibrations, plan)

    def _frontier(self, drafting: Drafting) -> _Frontier | None:
        num_nodes = len(drafting.tree.frontier)
        is_there = drafting.job.session.session_id in self._states  # else it gave way to an older one just now
        if not is_there or not self._make_room(num_nodes, drafting.state):
            return None
        return _Frontier(drafting, drafting.frontier_segment(self._memory.allocate(num_nodes)))

    def _grow(self, group: Sequence[_Frontier], plan: LayerPlan) -> None:
        """One fuzzy pass over the frontiers, and the level that its rows give."""
        started_ns = time.monotonic_ns()
        segments = [frontier.segment for frontier in group]
        layout = lay_out(segments)
        rows = [layout.flat_row(index, row) for index, segment in enumerate(segments) for row in range(len(segment))]
        draft_logits = self._decoder.forward(layout, self._memory.pool, plan, rows).logits
        draftings = [frontier.drafting for frontier in group]
        self._add_level(draftings, draft_logits)
        for drafting in draftings:
            drafting.num_fuzzy_steps += 1
            drafting.fuzzy_ns += time.monotonic_ns() - started_ns

    def _add_level(self, draftings: Sequence[Drafting], draft_logits: torch.Tensor) -> None:
        """Rank the candidates of every frontier row, in the order of `draft_logits` [rows, V]."""
        ranked = rank_level(self._decoder.executor, draftings, draft_logits)
        for drafting, candidates in zip(draftings, ranked, strict=True):
            drafting.tree.add_level(candidates)

    def _finish(self, drafting: Drafting) -> Proposal:
        drafting.state.drafting = None
        self._last_job_ns = time.monotonic_ns()
        timings = DraftTimings(
            calibrate_ns=drafting.calibrate_ns,
            fuzzy_ns=drafting.fuzzy_ns,
            num_fuzzy_steps=drafting.num_fuzzy_steps,
        )
        return Proposal(drafting.job, drafting.tree.scored(), timings, early_rows=self._early_rows(drafting.state))

    def _early_rows(self, state: SessionState) -> Mapping[int, int]:
        """Rows whose children come from an early exit, and which."""
        if state.exits is None:
            return {}
        depths, num_layers = state.exits.exits, self._decoder.config.num_layers
        return {row: index + 1 for row, index in state.exits.exit_of_row.items() if depths[index] < num_layers}

    def _make_room(self, num_slots: int, state: SessionState) -> bool:
        """Whether there are so many slots, if need be from younger sessions; else the session gives way itself."""
        others = itertools.takewhile(lambda other: other is not state, [*reversed(self._states.values())])
        if make_room(self._memory, num_slots, others, self._evict):
            return True
        self._evict(state)
        return False

    def _evict(self, state: SessionState) -> None:
        self._memory.num_preemptions += 1
        self._evicted.append(state.session)
        self._forget(state.session)
        state.slots.release()


def _is_finished(drafting: Drafting) -> bool:
    return drafting.is_calibrated and not drafting.tree.frontier


def _may_leave(chain: _Chain) -> bool:
    """Whether it is a calibration that goes only as deep as its level needs; prompts are read whole."""
    return chain.drafting is not None and chain.state.exits is not None


def _way_of_frontier(frontier: _Frontier) -> tuple[LayerPlan, bool]:
    """The plan, and whether the level may leave early."""
    return frontier.drafting.job.session.plan, frontier.drafting.state.exits is not None


def _by_plan(items: Sequence[_ItemT], plan_of: Callable[[_ItemT], _PlanT]) -> Iterable[tuple[_PlanT, list[_ItemT]]]:
    groups: dict[_PlanT, list[_ItemT]] = {}
    for item in items:
        groups.setdefault(plan_of(item), []).append(item)
    return groups.items()


def _fitting(items: Sequence[_ItemT], num_rows_of: Callable[[_ItemT], int], most_rows: int) -> list[_ItemT]:
    """The first of `items` that fit one pass together; the others' turn comes with a later one. At least one."""
    taken: list[_ItemT] = []
    for item in items:
        most_rows -= num_rows_of(item)
        if taken and most_rows < 0:
            break
        taken.append(item)
    return taken
