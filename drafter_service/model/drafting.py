"""EasySpec's drafter (arXiv 2502.02493): fuzzy, layer-parallel steps between exact calibrations.

A round: drop the fuzzy KV entries of the last tree, run one exact, layer-sequential pass over the accepted and
bonus tokens (bonus calibration), whose last row yields the first level; then one fuzzy step per further level.

Sessions share every pass and need not be in step: each of our steps calibrates those whose verdicts have come, reads
a chunk of the prompts, and grows every tree by a level. A late session joins at the next level.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drafter_service.model.batch import EarlyLevels, Holders, by_way, fitting
from drafter_service.model.exit_state import ExitState
from drafter_service.model.growth import DEFAULT_RANKING, RankingSettings, Sharpness
from drafter_service.model.parallel_levels import add_levels, with_masks
from drafter_service.model.ranking import rank_level
from drafter_service.model.state import Drafting, ModelState
from drafter_service.model.vocabulary_bridge import VocabularyBridge
from drafter_service.request import DraftRequest
from easyspec.engine.average import clock_average
from easyspec.engine.prefill_pace import PrefillPace
from easyspec.engine.prompt_shares import served_readers, share_out
from easyspec.errors import CapacityError
from easyspec.model.decoder import Decoder
from easyspec.model.kv_cache import KvMemory
from easyspec.model.row_layout import Segment, lay_out
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.sources import DraftSources

# A session that had a tree so recently will soon come for the next one, and would wait for a long step.
_DRAFTING_WITHIN_NS = 1_000_000_000


@dataclass(frozen=True)
class _Chain:
    """Committed tokens to compute: a chunk of a prompt, or (with a drafting) all that a calibration covers, and behind
    them mask tokens in `mask_slots` if the draft model fills in further levels at once."""

    state: ModelState
    segment: Segment
    drafting: Drafting | None
    mask_slots: Sequence[int] = ()


class ModelDrafting:
    """Guesses with the draft model, and keeps nothing of any session: their states are handed in, oldest first.

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
        early_exits: EarlyLevels | None = None,
        max_batch_rows: int = 512,
        bridge: VocabularyBridge | None = None,
        *,
        always_deepens: bool = False,
    ) -> None:
        self.decoder = decoder
        self.memory = memory
        self._ranking = ranking
        self._bridge = bridge
        self._max_batch_rows = max_batch_rows
        self._early = early_exits
        self.max_tree_slots = max_tree_slots
        self._pace = PrefillPace(max_prefill_slowdown, prefill_chunk)
        self._always_deepens = always_deepens
        self._mask_token_id = decoder.config.pard_token
        self._level_s = clock_average()
        self._served = itertools.count(1)
        self._last_draft_ns = -_DRAFTING_WITHIN_NS

    def open(self, request: DraftRequest, token_ids: list[int], *, is_alone: bool) -> ModelState:
        """A session's state, if there is room for its prompt and a tree or it `is_alone`; raises CapacityError."""
        sharpness = Sharpness(self._ranking)
        state = ModelState(request, token_ids, self.memory, sharpness, self._exit_state(request), self._bridge)
        num_hit = state.take_prefix()
        wanted = state.num_uncached + self.max_tree_slots
        if not is_alone and wanted > self.memory.num_available:
            state.slots.release()
            raise CapacityError(
                f"KV memory is full: {wanted} token slots wanted, {self.memory.num_available} of "
                f"{self.memory.num_slots} free"
            )
        self.memory.num_query_tokens += len(token_ids) - 1
        self.memory.num_hit_tokens += num_hit
        return state

    def _exit_state(self, request: DraftRequest) -> ExitState | None:
        """Where the session's levels may leave: at early exits, and after the last layer if the model is asked too."""
        config = self.decoder.config
        if DraftSources.EARLY_EXIT not in request.sources:
            return None
        assert config.early_exits, "sessions ask for sources that are here"
        is_whole_asked = DraftSources.MODEL in request.sources
        exits = [*config.early_exits, *([config.num_layers] if is_whole_asked else [])]
        return ExitState(exits, config.num_layers)

    @property
    def _early_levels(self) -> EarlyLevels:
        assert self._early is not None, "sessions ask for sources that are here"
        return self._early

    def begin(self, state: ModelState, budget: TreeBudget, token_s: float | None) -> None:
        """Learn from the verdict and drop the last tree; the next step calibrates.

        A further level must be expected to bring tokens whose time, `token_s` each, is more than the level takes.
        """
        if token_s is not None and not self._always_deepens:
            state.least_gain = self._level_s.value / token_s
        if state.exits is not None:
            self._early_levels.learn(state)
        state.begin(budget)

    def step(self, states: Sequence[ModelState]) -> list[ModelState]:
        """Calibrate beside chunks of prompts; then one level for every tree that is not full.

        Returns the states whose slots went to older ones; they are given up.
        """
        with torch.inference_mode():
            return self._step(Holders(self.memory, [*states]))

    def _step(self, holders: Holders) -> list[ModelState]:
        started_ns = time.monotonic_ns()
        chains = self._chains(holders)
        for (plan, is_early), members in by_way(chains, self._way_of_chain):
            if is_early:
                self._early_levels.calibrate([(chain.state, chain.segment) for chain in members], plan)
            else:
                self._run_chains(members, plan)
        num_frontier_rows = self._grow_all(holders)
        num_chain_rows = sum(len(chain.segment) for chain in chains if chain.drafting is not None)
        num_prompt_rows = sum(len(chain.segment) for chain in chains if chain.drafting is None)
        if chains or num_frontier_rows:
            duration_ns = time.monotonic_ns() - started_ns
            self._pace.observe(num_chain_rows + num_frontier_rows, num_prompt_rows, duration_ns)
        if any(state.is_done for state in holders.states):
            self._last_draft_ns = time.monotonic_ns()
        for chain in chains:
            chain.state.is_in_pass = False
        return holders.evicted

    def _grow_all(self, holders: Holders) -> int:
        """One level for every tree that is not full; returns the rows it took."""
        growing = [state for state, drafting in holders.draftings if drafting.is_calibrated and state.growing.frontier]
        # Those nearest to their end go first, and make room.
        nearest = sorted(growing, key=lambda state: -state.growing.level)
        grown = fitting(nearest, lambda state: len(state.growing.frontier), self._max_batch_rows)
        frontiers: list[tuple[ModelState, Segment]] = []
        for state in grown:
            num_nodes = len(state.growing.frontier)
            if state in holders.states and holders.make_room(num_nodes, state):
                frontiers.append((state, state.frontier_segment(self.memory.allocate(num_nodes))))
        # An older session that came later may have taken the slots of one before it.
        frontiers = [frontier for frontier in frontiers if frontier[0] in holders.states]
        for (plan, is_early), group in by_way(frontiers, _way_of_frontier):
            if is_early:
                self._early_levels.grow(group, plan)
            else:
                self.grow(group, plan)
        return sum(len(segment) for _, segment in frontiers)

    def _chains(self, holders: Holders) -> list[_Chain]:
        """This step's calibrations and chunks of prompts, with their slots."""
        ready = fitting(
            [s for s, drafting in holders.draftings if not drafting.is_calibrated and s.num_unread <= 0],
            lambda state: state.num_uncached,
            self._max_batch_rows,
        )
        wanted = [(state, state.num_uncached, state.drafting) for state in ready]
        num_rows = sum(num_tokens for _, num_tokens, _ in wanted)
        wanted += [(state, num_tokens, None) for state, num_tokens in self._prompt_shares(holders, num_rows)]
        age = {id(state): index for index, state in enumerate(holders.states)}
        chains: list[_Chain] = []
        for state, num_tokens, drafting in sorted(wanted, key=lambda each: age[id(each[0])]):
            num_masks = self._num_masks(state) if drafting is not None else 0
            if state in holders.states and holders.make_room(num_tokens + num_masks, state):
                state.is_in_pass = True
                segment = state.chain_segment(state.slots.extend(num_tokens))
                masks = self.memory.allocate(num_masks)
                if self._mask_token_id is not None and masks:
                    state.tree_slots = {-1 - index: slot for index, slot in enumerate(masks)}  # dropped with the pass
                    segment = with_masks(segment, self._mask_token_id, masks, len(state.token_ids))
                chains.append(_Chain(state, segment, drafting, masks))
        return chains

    def _num_masks(self, state: ModelState) -> int:
        """Mask tokens behind a calibration: one for each level but the first."""
        is_parallel = self._mask_token_id is not None and state.exits is None
        return state.growing.num_levels - 1 if is_parallel else 0

    def _prompt_shares(self, holders: Holders, num_other_rows: int) -> list[tuple[ModelState, int]]:
        """Chunks of prompts for a step: fair shares, first for the sessions that waited longest."""
        unread = [state for state in holders.states if state.num_unread > 0]
        for state in unread:
            self.memory.num_hit_tokens += state.take_prefix()
        unread = sorted((state for state in unread if state.num_unread > 0), key=lambda state: state.served_at)
        if not unread:
            return []
        is_anyone_drafting = bool(holders.draftings) or self._has_just_drafted()
        num_rows = self._pace.num_prompt_rows(num_other_rows, is_anyone_decoding=is_anyone_drafting)
        served = served_readers(unread, self.memory, num_rows)
        shares: list[tuple[ModelState, int]] = []

        def give(state: ModelState, num_tokens: int) -> int:
            state.served_at = next(self._served)
            if num_tokens > 0:
                shares.append((state, num_tokens))
            return num_tokens

        share_out(served, num_rows, lambda state: state.num_unread, give)
        return shares

    def _has_just_drafted(self) -> bool:
        return time.monotonic_ns() - self._last_draft_ns < _DRAFTING_WITHIN_NS

    def _way_of_chain(self, chain: _Chain) -> tuple[LayerPlan, bool]:
        """The plan, exact but for the ablation that keeps fuzzy entries; and whether a calibration goes only as deep as
        its level needs. Prompts are read whole."""
        is_exact = chain.drafting is None or chain.state.request.calibration
        plan = self.decoder.sequential_plan if is_exact else chain.state.request.plan
        return plan, chain.drafting is not None and chain.state.exits is not None

    def _run_chains(self, chains: Sequence[_Chain], plan: LayerPlan) -> None:
        """Exact pass over committed tokens without exact KV; the last row of a calibration gives the first level."""
        started_ns = time.monotonic_ns()
        layout = lay_out([chain.segment for chain in chains])
        rows = [
            layout.flat_row(index, row)
            for index, chain in enumerate(chains)
            if chain.drafting is not None
            for row in range(len(chain.segment) - len(chain.mask_slots) - 1, len(chain.segment))
        ]
        result = self.decoder.forward(layout, self.memory.pool, plan, rows)
        calibrated = [chain for chain in chains if chain.drafting is not None]
        if self._mask_token_id is not None:
            self._fill_in(calibrated, result.logits, self._mask_token_id)
        elif rows:
            self._add_level([chain.state for chain in calibrated], result.logits)
        elapsed_ns = time.monotonic_ns() - started_ns
        for chain in chains:
            state = chain.state
            num_tokens = len(chain.segment) - len(chain.mask_slots)
            is_unbroken = state.num_exact + num_tokens == state.slots.num_cached
            if is_unbroken and plan == self.decoder.sequential_plan:
                state.num_exact = state.slots.num_cached
            if chain.drafting is None:
                state.share()
            else:
                chain.drafting.is_calibrated = True
                chain.drafting.calibrate_ns += elapsed_ns

    def _fill_in(self, chains: Sequence[_Chain], draft_logits: torch.Tensor, mask_token_id: int) -> None:
        """Grow every tree by all levels that its mask tokens stand for, and drop these."""
        for chain, logits in zip(chains, draft_logits.split([len(c.mask_slots) + 1 for c in chains]), strict=True):
            add_levels(self.decoder.executor, chain.state, logits, mask_token_id)
            chain.state.drop_tree()

    def grow(self, group: Sequence[tuple[ModelState, Segment]], plan: LayerPlan) -> None:
        """One fuzzy pass over the frontiers, and the level that its rows give."""
        started_ns = time.monotonic_ns()
        layout = lay_out([segment for _, segment in group])
        draft_logits = self.decoder.forward(layout, self.memory.pool, plan, range(sum(layout.num_rows))).logits
        states = [state for state, _ in group]
        self._add_level(states, draft_logits)
        elapsed_ns = time.monotonic_ns() - started_ns
        self._level_s.add(elapsed_ns / 1e9)
        for state in states:
            if state.drafting is not None:
                state.drafting.num_fuzzy_steps += 1
                state.drafting.fuzzy_ns += elapsed_ns

    def _add_level(self, states: Sequence[ModelState], draft_logits: torch.Tensor) -> None:
        """Rank the candidates of every frontier row, in the order of `draft_logits` [rows, V]."""
        for state, candidates in zip(states, rank_level(self.decoder.executor, states, draft_logits), strict=True):
            state.growing.add_level(candidates)


def _way_of_frontier(frontier: tuple[ModelState, Segment]) -> tuple[LayerPlan, bool]:
    """The plan, and whether the level may leave early."""
    return frontier[0].request.plan, frontier[0].exits is not None
