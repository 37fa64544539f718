"""The verifier's core: sessions of the base model, prefilled in chunks and verified in batches.

Runs on the device thread. A session's tokens are committed one verdict at a time; K and V exist for all of
them but the last, which is the root of the next tree.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from easyspec.engine.device_faults import is_out_of_memory
from easyspec.engine.device_thread import Task
from easyspec.engine.segments import committed_segment, with_nodes
from easyspec.engine.shell import CloseTask
from easyspec.errors import CapacityError, EasyspecError, InvalidRequestError, StalePositionError
from easyspec.model.decoder import Decoder, PassResult
from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.model.row_layout import RowLayout, Segment, lay_out
from easyspec.speculation.acceptance import StopLimits, stop_limits
from easyspec.speculation.checks import check_logprobs, check_model, check_prompt, check_token_ids
from easyspec.speculation.grammar import CompiledGrammar, GrammarState
from easyspec.speculation.messages import KvUsage, OpenVerification, Verdict, VerifyTimings
from easyspec.speculation.sampling import TokenHistory
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from easyspec.telemetry.metrics import StepObserver, StepReport, ignore_step
from verifier_service.prompt_logprobs import PromptLogprobs
from verifier_service.scheduler import ScheduledSession, Scheduler, SchedulerLimits, Work
from verifier_service.tree_batch import TreeBatch
from verifier_service.verdicts import Case


@dataclass(eq=False)
class OpenTask(Task[int]):
    """Open a session; the result is its id. `grammar` is the request's, if it has one."""

    request: OpenVerification
    grammar: CompiledGrammar | None = None


@dataclass(eq=False)
class VerifyTask(Task[tuple[Verdict, VerifyTimings]]):
    """Judge a tree, and go on with plain rounds unasked; `following`, set before the answer, is the next of them."""

    session_id: int
    base_length: int
    tree: TokenTree
    num_plain_rounds: int = 0
    following: VerifyTask | None = field(default=None, init=False)


@dataclass(frozen=True)
class VerifierLimits:
    """What one session may ask for; `max_model_len` is what fits the KV memory."""

    served_model_name: str
    max_model_len: int
    max_tree_nodes: int


class VerifierSession(ScheduledSession):
    """One request at the verifier: its tokens, their slots, and the verdict it waits for."""

    def __init__(
        self,
        session_id: int,
        request: OpenVerification,
        limits: StopLimits,
        slots: SessionSlots,
        grammar: GrammarState | None,
        vocab_size: int,
    ) -> None:
        self._vocab_size = vocab_size
        super().__init__(
            session_id,
            [*request.prompt_token_ids, *request.output_token_ids],
            slots,
            takes_prefixes=not request.prompt_logprobs,  # these need the rows of the whole prompt
        )
        self.sampling = request.sampling
        self.grammar = grammar
        self.num_top_logprobs = request.num_top_logprobs
        self.prompt_logprobs: PromptLogprobs | None = None
        if request.prompt_logprobs and request.num_top_logprobs is not None:
            self.prompt_logprobs = PromptLogprobs(request.prompt_token_ids, request.num_top_logprobs)
        self.limits = limits
        self._min_length = len(request.prompt_token_ids) + request.stop.min_tokens
        self.history = TokenHistory(request.prompt_token_ids, request.output_token_ids)
        self.waiting: VerifyTask | None = None
        self.is_finished = False

    def case(self, tree: TokenTree, first_row: int) -> Case:
        """What there is to judge, the tree's rows beginning at `first_row` of the batch."""
        base_length = len(self.token_ids)
        return Case(
            tree,
            base_length,
            self.sampling,
            self.history,
            self.limits,
            first_row,
            self.grammar,
            self.num_top_logprobs,
            self._min_length,
            self._unending_bits if base_length < self._min_length else None,
        )

    @cached_property
    def _unending_bits(self) -> NDArray[np.uint8]:
        """Every token that does not end the output, as `ChoiceRow.allowed_bits`."""
        allowed = np.ones(self._vocab_size, dtype=np.uint8)
        allowed[[*self.limits.stop_token_ids]] = 0
        return np.packbits(allowed, bitorder="little")

    def with_first_news(self, verdict: Verdict) -> Verdict:
        """The session's first verdict carries what it found cached, and the prompt's log-probabilities, if asked for;
        they are kept no longer."""
        if self.num_hit_tokens:
            verdict = replace(verdict, num_cached_tokens=self.num_hit_tokens)
            self.num_hit_tokens = 0
        if self.prompt_logprobs is None:
            return verdict
        entries, self.prompt_logprobs = self.prompt_logprobs.entries(), None
        return replace(verdict, prompt_logprobs=entries)

    def segment(self, slots: Sequence[int], tree: TokenTree | None) -> Segment:
        """Rows for the committed tokens that live in `slots`, and for the nodes of a tree behind the last of them."""
        positions = range(self.slots.num_cached - len(slots), self.slots.num_cached)
        chain = committed_segment(self.token_ids[positions.start : positions.stop], self.slots, positions)
        if tree is None or not tree.token_ids:
            return chain
        root, last = len(self.token_ids) - 1, self.limits.max_total_length - 1  # deeper nodes can never be emitted
        node_positions = [min(root + depth, last) for depth in tree.row_depths[1:]]
        parents = [row - 1 if row > 0 else None for row in tree.parent_rows]
        return with_nodes(chain, tree.token_ids, node_positions, self.tree_slots, parents)


@dataclass(frozen=True)
class _Computed:
    """A pass: its rows, the trees among them, and what it came to."""

    layout: RowLayout
    batch: TreeBatch
    result: PassResult


class Verifier:
    """Steps over batches of sessions: the trees that are ready and pieces of the prompts that came in."""

    def __init__(
        self,
        decoder: Decoder,
        memory: KvMemory,
        limits: VerifierLimits,
        scheduler_limits: SchedulerLimits,
        on_step: StepObserver = ignore_step,
    ) -> None:
        self._decoder = decoder
        self._memory = memory
        self._limits = limits
        self._on_step = on_step
        self._scheduler: Scheduler[VerifierSession] = Scheduler(memory, scheduler_limits)
        self._session_ids = itertools.count(1)
        self._slices: tuple[Sequence[Work[VerifierSession]], Iterator[bool]] | None = None

    def usage(self) -> KvUsage:
        """KV memory as it is now; may be read from another thread."""
        return self._memory.usage(self._scheduler.num_sessions)

    def accept(self, task: Task[Any]) -> None:
        """Open, queue or close; an error that the caller made is the answer to that task alone."""
        try:
            if isinstance(task, OpenTask):
                self._open(task)
            elif isinstance(task, VerifyTask):
                self._enqueue(task)
            elif isinstance(task, CloseTask):
                self._scheduler.close(task.session_id)
        except EasyspecError as error:
            task.fail(error)

    def patience_s(self) -> float:
        """How long the next step should wait for sessions that are about to come back."""
        return self._scheduler.patience_s()

    def step(self) -> bool:
        """One pass over what the scheduler chose; True if there is more to compute."""
        with torch.inference_mode():
            works = self._scheduler.plan()
            if works:
                self._verify(works)
            is_reading = self._read_piece()
        return (bool(works) or is_reading) and self._scheduler.is_anyone_waiting

    def abandon(self, error: BaseException) -> None:
        """Fail every waiting task and end its session, whose KV may be half written."""
        self._scheduler.fail_openings(error)
        for session in self._scheduler.abandon():
            if session.waiting is not None:
                session.waiting.fail(error)
            session.waiting, session.is_finished = None, True

    def _open(self, task: OpenTask) -> None:
        """Check the request and let its session in as soon as there is room."""
        request, config = task.request, self._decoder.config
        check_model(request.model, self._limits.served_model_name)
        check_prompt(request.prompt_token_ids, config.vocab_size, self._limits.max_model_len)
        check_token_ids("output_token_ids", request.output_token_ids, config.vocab_size)
        request.sampling.check(config.vocab_size)
        request.stop.check(config.vocab_size)
        num_prompt, num_output = len(request.prompt_token_ids), len(request.output_token_ids)
        # Where a grammar allows an end of sequence it means it (see `grammar.py`).
        stop = request.stop if task.grammar is None else replace(request.stop, ignore_eos=False)
        limits = stop_limits(stop, num_prompt, config.eos_token_ids, self._limits.max_model_len)
        if num_prompt + num_output >= limits.max_total_length:
            raise InvalidRequestError("output_token_ids", f"{num_output} tokens", "fewer than max_tokens")
        has_prompt = request.prompt_logprobs
        check_logprobs(request.num_top_logprobs, has_prompt=has_prompt, num_prompt_tokens=num_prompt)
        grammar = None if task.grammar is None else _replayed(task.grammar, request)
        slots = SessionSlots(self._memory)
        session = VerifierSession(next(self._session_ids), request, limits, slots, grammar, config.vocab_size)
        self._scheduler.open(session, task)

    def _enqueue(self, task: VerifyTask) -> None:
        session = self._scheduler.get(task.session_id)
        if session is None or session.is_finished:
            raise InvalidRequestError("session", task.session_id, "an open session that has not finished")
        if session.waiting is not None or task.base_length != len(session.token_ids):
            raise StalePositionError(task.base_length, len(session.token_ids))
        task.tree.check(self._decoder.config.vocab_size, self._limits.max_tree_nodes)
        session.waiting = task
        self._scheduler.submit(session, task.tree, task.arrived_ns)

    def _verify(self, works: Sequence[Work[VerifierSession]]) -> None:
        """One pass over the batch, then a verdict for each session whose tree it holds.

        Where there is no memory for it, a pass for each: only a session for which there is none by itself is refused.
        """
        started_ns = time.monotonic_ns()
        try:
            computed = self._compute(works)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            structlog.get_logger().warning("step_without_memory", num_sessions=len(works))
            if len(works) == 1:
                self._refuse(works[0].session)
                return
            for work in works:
                self._verify([work])
            return
        outcomes = computed.batch.decide(computed.result)
        self._add_prompt_logprobs(works, computed.layout, computed.result)
        compute_ns = time.monotonic_ns() - started_ns
        num_rows = sum(computed.layout.num_rows)
        judged = [work.session for work in works if work.tree is not None]
        self._on_step(StepReport("verify" if judged else "prefill", compute_ns, num_rows, len(works)))
        following: list[VerifyTask] = []
        for session, outcome in zip(judged, outcomes, strict=True):
            task, session.waiting = session.waiting, None
            assert task is not None, "still the same task"
            if isinstance(outcome, EasyspecError):
                self._give_up(session)
                task.fail(outcome)
                continue
            self._commit(session, outcome)
            timings = VerifyTimings(started_ns - task.arrived_ns, compute_ns, num_rows, len(works))
            if task.num_plain_rounds > 0 and not session.is_finished:
                task.following = VerifyTask(
                    session.session_id, len(session.token_ids), EMPTY_TREE, task.num_plain_rounds - 1
                )
            if task.finish((session.with_first_news(outcome), timings)) and task.following is not None:
                following.append(task.following)
        self._scheduler.computed(works, compute_ns)
        # After `computed`, which takes the sessions out of the queue that these enter.
        for task in following:
            self._enqueue(task)

    def _compute(self, works: Sequence[Work[VerifierSession]]) -> _Computed:
        """The pass over the batch, which changes nothing but K and V and can be computed again."""
        layout = lay_out([work.session.segment(work.slots, work.tree) for work in works])
        batch = TreeBatch(self._decoder)
        for index, work in enumerate(works):
            if work.tree is not None:  # else it is a piece of a prompt
                root = layout.flat_row(index, len(work.slots) - 1)
                batch.add(work.session.case(work.tree, first_row=len(batch.logit_rows)), root)
        needs_prompt = any(work.session.prompt_logprobs is not None for work in works)
        result = self._decoder.forward(
            layout, self._memory.pool, None, batch.logit_rows, batch.choice_rows, keeps_hidden=needs_prompt
        )
        return _Computed(layout, batch, result)

    def _refuse(self, session: VerifierSession) -> None:
        """There is no memory for the session's part of a step, even by itself: it ends."""
        self._scheduler.fail(session)
        self._give_up(session)
        task, session.waiting = session.waiting, None
        if task is not None:
            task.fail(CapacityError("there is no memory for a step of this request"))

    def _read_piece(self) -> bool:
        """Some layers of the prompts that are read on the side, at least one; False if there are none."""
        piece = self._scheduler.piece
        if piece is None:
            self._slices = None
            return False
        try:
            started_ns = time.monotonic_ns()
            # By identity: a new piece of the same sessions begins at the first layer.
            if self._slices is None or self._slices[0] is not piece:
                layout = lay_out([work.session.segment(work.slots, None) for work in piece])
                self._slices = (piece, self._decoder.forward_in_slices(layout, self._memory.pool))
            most_ns = self._scheduler.slice_ns()
            num_layers, elapsed_ns, is_computed = 0, 0, False
            while most_ns is None or elapsed_ns * (num_layers + 1) <= most_ns * max(1, num_layers):  # room for one more
                is_computed = next(self._slices[1])
                num_layers += 1
                elapsed_ns = time.monotonic_ns() - started_ns
                if is_computed:
                    num_rows = sum(len(work.slots) for work in piece)
                    self._on_step(StepReport("prefill", elapsed_ns, num_rows, len(piece)))
                    break
            self._scheduler.piece_advanced(num_layers, elapsed_ns, is_computed=is_computed)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # The youngest goes; the others begin again without it.
            self._slices = None
            self._scheduler.drop_piece()
            self._refuse(max((work.session for work in piece), key=lambda session: session.session_id))
        return True

    def _add_prompt_logprobs(
        self, works: Sequence[Work[VerifierSession]], layout: RowLayout, result: PassResult
    ) -> None:
        for index, work in enumerate(works):
            entries, num_tokens, first = work.session.prompt_logprobs, len(work.slots), layout.flat_row(index, 0)
            if entries is not None:
                position = work.session.slots.num_cached - num_tokens
                entries.add(self._decoder, result, range(first, first + num_tokens), position)

    def _give_up(self, session: VerifierSession) -> None:
        """Nothing more will come of the session: free the tree, and wait to be closed."""
        self._memory.free(session.tree_slots)
        session.tree_slots, session.is_finished = [], True

    def _commit(self, session: VerifierSession, verdict: Verdict) -> None:
        """Accepted nodes keep their slots as committed positions; the others are freed. Nothing is copied."""
        tree_slots, session.tree_slots = session.tree_slots, []
        kept = [tree_slots[row - 1] for row in verdict.accepted_rows]
        self._memory.free(sorted(set(tree_slots) - set(kept)))
        session.slots.append(kept)
        # One token more than slots: the bonus token's K and V are computed by the next step, as the root of its tree.
        session.token_ids.extend(verdict.token_ids)
        session.history.commit(verdict.token_ids)
        session.is_finished = verdict.finish_reason is not None


def _replayed(compiled: CompiledGrammar, request: OpenVerification) -> GrammarState:
    """Where the output so far stands in its grammar."""
    state = GrammarState(compiled, ignore_eos=request.stop.ignore_eos)
    for index, token_id in enumerate(request.output_token_ids):
        if not state.advance(token_id):
            raise InvalidRequestError(f"output_token_ids[{index}]", token_id, "a token that sampling.grammar allows")
    return state
