"""EasySpec's drafter (arXiv 2502.02493): fuzzy, layer-parallel steps between exact calibrations.

A round: drop the fuzzy KV entries of the last tree, run one exact, layer-sequential pass over the accepted and
bonus tokens (bonus calibration), whose last row yields the first level; then one fuzzy step per further level.

Sessions share every pass and need not be in step: each of our steps calibrates those whose verdicts have come, reads
a chunk of the prompts, and grows every tree by a level. A late session joins at the next level.

A draft model that was trained to fill in mask tokens (PARD, arXiv 2504.18583) drafts all levels in one pass: behind the
new tokens of a calibration stand mask tokens, each at the position of a further level.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drafter_service.model.batch import EarlyLevels, Holders, by_way, fitting
from drafter_service.model.exit_state import ExitState
from drafter_service.model.growth import Sharpness
from drafter_service.model.ranking import rank_level
from drafter_service.model.state import ModelState
from drafter_service.model.vocabulary_bridge import VocabularyBridge
from drafter_service.request import DraftRequest
from easyspec.engine.average import clock_average
from easyspec.engine.prefill_pace import PrefillPace
from easyspec.engine.prompt_shares import served_readers, share_out
from easyspec.engine.segments import with_nodes
from easyspec.errors import CapacityError
from easyspec.model.decoder import Decoder, PassResult
from easyspec.model.kv_cache import KvMemory
from easyspec.model.row_layout import Segment, lay_out
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.ranking import TokenRanker
from easyspec.speculation.sources import DraftSources

# A session that had a tree so recently will soon come for the next one, and would wait for a long step.
_DRAFTING_WITHIN_NS = 1_000_000_000


@dataclass(frozen=True)
class _Chain:
    """Committed tokens to compute: a chunk of a prompt, or all that a calibration covers, and behind them `num_masks`
    mask tokens if the draft model fills in further levels at once."""

    state: ModelState
    segment: Segment
    is_prompt: bool
    plan: LayerPlan
    num_masks: int = 0

    @property
    def is_early(self) -> bool:
        """Whether it goes only as deep as its level needs; prompts are read whole."""
        return not self.is_prompt and self.state.exits is not None


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
        max_prefill_slowdown: float = 1.7,
        early_exits: EarlyLevels | None = None,
        max_batch_rows: int = 512,
        bridge: VocabularyBridge | None = None,
        *,
        always_deepens: bool = False,
    ) -> None:
        self.decoder = decoder
        self.memory = memory
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

    def open(self, request: DraftRequest, token_ids: list[int], others: Sequence[ModelState] = ()) -> ModelState:
        """A session's state, if there is room for its prompt and a tree beside `others`, or there are none.

        Nothing that others draft ahead keeps room from it; raises CapacityError.
        """
        exits, config = None, self.decoder.config
        if DraftSources.EARLY_EXIT in request.sources:
            assert config.early_exits, "sessions ask for sources that are here"
            # Levels may go through all layers if the model is asked too.
            last = [config.num_layers] if DraftSources.MODEL in request.sources else []
            exits = ExitState([*config.early_exits, *last], config.num_layers)
        state = ModelState(request, token_ids, self.memory, Sharpness(), exits, self._bridge)
        num_hit = state.take_prefix()
        wanted = state.num_uncached + self.max_tree_slots
        for other in others:
            if wanted > self.memory.num_available:
                other.drop_ahead()
        if others and wanted > self.memory.num_available:
            state.slots.release()
            raise CapacityError(
                f"KV memory is full: {wanted} token slots wanted, {self.memory.num_available} of "
                f"{self.memory.num_slots} free"
            )
        self.memory.num_query_tokens += len(token_ids) - 1
        self.memory.num_hit_tokens += num_hit
        return state

    def begin(self, state: ModelState, budget: TreeBudget, token_s: float | None) -> None:
        """Learn from the verdict and drop the last tree; the next step calibrates.

        A further level must be expected to bring tokens whose time, `token_s` each, is more than the level takes.
        """
        if token_s is not None and not self._always_deepens:
            state.least_gain = self._level_s.value / token_s
        if state.exits is not None and self._early is not None:
            self._early.learn(state)
        state.begin(budget)
        if state.num_uncached > self._max_batch_rows and state.exits is None and state.request.calibration:
            state.num_prompt_tokens = len(state.token_ids)  # read in chunks, as after many rounds without the model

    def step(self, states: Sequence[ModelState]) -> list[ModelState]:
        """Calibrate beside chunks of prompts; then one level for every tree that is not full.

        Returns the states whose slots went to older ones; they are given up.
        """
        holders, started_ns = Holders(self.memory, [*states]), time.monotonic_ns()
        with torch.inference_mode():
            chains = self._take_chains(holders)
            for (plan, is_early), members in by_way(chains, lambda chain: (chain.plan, chain.is_early)):
                self._run_chains(members, plan, is_early=is_early)
            num_frontier_rows = self._grow_all(holders)
        num_chain_rows = sum(len(chain.segment) for chain in chains if not chain.is_prompt)
        num_prompt_rows = sum(len(chain.segment) for chain in chains if chain.is_prompt)
        if chains or num_frontier_rows:
            duration_ns = time.monotonic_ns() - started_ns
            self._pace.observe(num_chain_rows + num_frontier_rows, num_prompt_rows, duration_ns)
        if any(state.is_done for state in holders.states):
            self._last_draft_ns = time.monotonic_ns()
        for chain in chains:
            chain.state.is_in_pass = False
        return holders.evicted

    def _take_chains(self, holders: Holders) -> list[_Chain]:
        """This step's calibrations and chunks of prompts, with their slots."""
        ready = fitting(
            [state for state in holders.drafting if not state.growing.expanded and state.num_unread <= 0],
            lambda state: state.num_uncached,
            self._max_batch_rows,
        )
        wanted = [(state, state.num_uncached, False) for state in ready]
        num_rows = sum(num_tokens for _, num_tokens, _ in wanted)
        wanted += [(state, num_tokens, True) for state, num_tokens in self._prompt_shares(holders, num_rows)]
        age = {id(state): index for index, state in enumerate(holders.states)}
        chains: list[_Chain] = []
        for state, num_tokens, is_prompt in sorted(wanted, key=lambda each: age[id(each[0])]):
            # One for each level but the first.
            has_masks = self._mask_token_id is not None and state.exits is None and not is_prompt
            num_masks = state.growing.budget.num_levels - 1 if has_masks else 0
            if state in holders.states and holders.make_room(num_tokens + num_masks, state):
                state.is_in_pass = True
                segment = state.take_chain(num_tokens)
                if self._mask_token_id is not None and num_masks:
                    # Each sees the committed text, the ones before it, and itself; slots are the tree's until then.
                    masks, base_length = self.memory.allocate(num_masks), len(state.token_ids)
                    state.tree_slots = {-1 - index: slot for index, slot in enumerate(masks)}
                    positions = range(base_length, base_length + num_masks)
                    before = [None, *range(num_masks - 1)]
                    segment = with_nodes(segment, [self._mask_token_id] * num_masks, positions, masks, before)
                # Exact but for the ablation that keeps fuzzy entries.
                is_exact = is_prompt or state.request.calibration
                plan = self.decoder.sequential_plan if is_exact else state.request.plan
                chains.append(_Chain(state, segment, is_prompt, plan, num_masks))
        return chains

    def _prompt_shares(self, holders: Holders, num_other_rows: int) -> list[tuple[ModelState, int]]:
        """Chunks of prompts for a step: fair shares, first for the sessions that waited longest."""
        unread = [state for state in holders.states if state.num_unread > 0]
        for state in unread:
            self.memory.num_hit_tokens += state.take_prefix()
        unread = sorted((state for state in unread if state.num_unread > 0), key=lambda state: state.served_at)
        if not unread:
            return []
        has_just_drafted = time.monotonic_ns() - self._last_draft_ns < _DRAFTING_WITHIN_NS
        is_drafting = bool(holders.drafting) or has_just_drafted
        num_rows = self._pace.num_prompt_rows(num_other_rows, is_anyone_decoding=is_drafting)
        shares: list[tuple[ModelState, int]] = []

        def give(state: ModelState, num_tokens: int) -> int:
            state.served_at = next(self._served)
            if num_tokens > 0:
                shares.append((state, num_tokens))
            return num_tokens

        share_out(served_readers(unread, self.memory, num_rows), num_rows, lambda state: state.num_unread, give)
        return shares

    def _run_chains(self, chains: Sequence[_Chain], plan: LayerPlan, *, is_early: bool) -> None:
        """A pass over committed tokens without exact K and V; the last rows of calibrations give first levels."""
        started_ns = time.monotonic_ns()
        if is_early and self._early is not None:
            self._early.run([(chain.state, chain.segment) for chain in chains], plan)
        else:
            layout = lay_out([chain.segment for chain in chains])
            calibrated = [(index, chain) for index, chain in enumerate(chains) if not chain.is_prompt]
            rows = [
                layout.flat_row(index, row)
                for index, chain in calibrated
                for row in range(len(chain.segment) - chain.num_masks - 1, len(chain.segment))
            ]
            result = self.decoder.forward(layout, self.memory.pool, plan, rows)
            if self._mask_token_id is not None:
                parts = result.logits.split([chain.num_masks + 1 for _, chain in calibrated])
                for (_, chain), level_logits in zip(calibrated, parts, strict=True):
                    _add_levels(self.decoder.executor, chain.state, level_logits, self._mask_token_id)
            elif rows:
                self._add_level([chain.state for _, chain in calibrated], result)
        elapsed_ns = time.monotonic_ns() - started_ns
        for chain in chains:
            state, num_tokens = chain.state, len(chain.segment) - chain.num_masks
            is_unbroken = state.num_exact + num_tokens == state.slots.num_cached
            if not is_early and is_unbroken and plan == self.decoder.sequential_plan:
                state.num_exact = state.slots.num_cached
            if chain.is_prompt:
                state.share()
            else:
                state.add_time(elapsed_ns, is_fuzzy=False)

    def _grow_all(self, holders: Holders) -> int:
        """One level for every tree that is not full; returns the rows it took."""
        growing = [state for state in holders.drafting if state.growing.expanded and state.growing.frontier]
        # Those nearest to their end go first, and make room.
        nearest = sorted(growing, key=lambda state: -state.growing.level)
        frontiers: list[tuple[ModelState, Segment]] = []
        for state in fitting(nearest, lambda state: len(state.growing.frontier), self._max_batch_rows):
            if state in holders.states and holders.make_room(len(state.growing.frontier), state):
                frontiers.append((state, state.take_frontier()))
        # An older session that came later may have taken the slots of one before it.
        frontiers = [frontier for frontier in frontiers if frontier[0] in holders.states]
        for (plan, _), group in by_way(frontiers, lambda each: (each[0].request.plan, each[0].exits is not None)):
            self.grow(group, plan)
        return sum(len(segment) for _, segment in frontiers)

    def grow(self, group: Sequence[tuple[ModelState, Segment]], plan: LayerPlan) -> None:
        """One fuzzy pass over the frontiers, which may all leave early or none, and the level that its rows give."""
        started_ns = time.monotonic_ns()
        states = [state for state, _ in group]
        if states[0].exits is not None and self._early is not None:
            self._early.run(group, plan)
        else:
            layout = lay_out([segment for _, segment in group])
            self._add_level(states, self.decoder.forward(layout, self.memory.pool, plan, range(sum(layout.num_rows))))
            self._level_s.add((time.monotonic_ns() - started_ns) / 1e9)
        for state in states:
            state.add_time(time.monotonic_ns() - started_ns, is_fuzzy=True)

    def _add_level(self, states: Sequence[ModelState], result: PassResult) -> None:
        """Rank the candidates of every frontier row, whose logits `result` has in their order."""
        levels = rank_level(self.decoder.executor, states, result.named_logits, result.vocabulary)
        for state, candidates in zip(states, levels, strict=True):
            state.growing.add_level(candidates)


def _add_levels(ranker: TokenRanker, state: ModelState, draft_logits: torch.Tensor, mask_token_id: int) -> None:
    """Drop the mask tokens, and grow the tree by a level for every row of `draft_logits` [levels, V]; one host sync a
    level. A row knows nothing of the levels between: candidates of a level are the same whatever their parent."""
    state.drop_tree()
    draft_logits = draft_logits.index_fill(1, torch.tensor([mask_token_id], device=draft_logits.device), float("-inf"))
    for row in draft_logits:
        if not state.growing.frontier:
            return
        level = row[None].expand(len(state.growing.frontier), -1).contiguous()
        (candidates,) = rank_level(ranker, [state], level)
        state.growing.add_level(candidates)
