"""The verifier's core: sessions of the base model, prefilled in chunks and verified in batches.

Runs on the device thread. A session's tokens are committed one verdict at a time; K and V exist for all of
them but the last, which is the root of the next tree.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from easyspec.device_thread import Task
from easyspec.errors import EasyspecError, InvalidRequestError, StalePositionError
from easyspec.model.decoder import Decoder
from easyspec.model.kv_cache import KVPool, SessionSlots
from easyspec.model.row_layout import BLOCK_SIZE, Segment, TreeColumns
from easyspec.speculation.acceptance import StopLimits, stop_limits
from easyspec.speculation.checks import check_logprobs, check_model, check_prompt, check_token_ids
from easyspec.speculation.grammar import CompiledGrammar, GrammarState
from easyspec.speculation.messages import KvUsage, OpenVerification, Verdict, VerifyTimings
from easyspec.speculation.sampling import TokenHistory, tree_choice_rows
from easyspec.speculation.token_tree import TokenTree
from easyspec.telemetry.metrics import StepObserver, StepReport, ignore_step
from verifier_service.prompt_logprobs import PromptLogprobs
from verifier_service.verdicts import Case, decide


@dataclass(eq=False)
class OpenTask(Task[int]):
    """Open a session; the result is its id. `grammar` is the request's, if it has one."""

    request: OpenVerification
    grammar: CompiledGrammar | None = None


@dataclass(eq=False)
class VerifyTask(Task[tuple[Verdict, VerifyTimings]]):
    """Judge a tree."""

    session_id: int
    base_length: int
    tree: TokenTree


@dataclass(eq=False)
class CloseTask(Task[None]):
    """Free a session's memory."""

    session_id: int


@dataclass(frozen=True)
class VerifierLimits:
    """What one session and one step may take, in tokens and rows."""

    served_model_name: str
    max_tree_nodes: int
    max_batch_rows: int
    prefill_chunk: int


class VerifierSession:
    """One request at the verifier: its tokens, their slots, and the tree it waits for."""

    def __init__(
        self, request: OpenVerification, limits: StopLimits, slots: SessionSlots, grammar: GrammarState | None
    ) -> None:
        self.sampling = request.sampling
        self.grammar = grammar
        self.num_top_logprobs = request.num_top_logprobs
        self.prompt_logprobs: PromptLogprobs | None = None
        if request.prompt_logprobs and request.num_top_logprobs is not None:
            self.prompt_logprobs = PromptLogprobs(request.prompt_token_ids, request.num_top_logprobs)
        self.limits = limits
        self.slots = slots
        self.token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        self.history = TokenHistory(request.prompt_token_ids, request.output_token_ids)
        self.waiting: VerifyTask | None = None
        self.tree_slots: list[int] = []
        self.is_finished = False

    def case(self, tree: TokenTree, first_row: int) -> Case:
        """What there is to judge, the tree's rows beginning at `first_row` of the batch."""
        base_length = len(self.token_ids)
        choice_rows = tree_choice_rows(tree, base_length, self.sampling, self.history)
        return Case(tree, base_length, self.limits, first_row, choice_rows, self.grammar, self.num_top_logprobs)

    def with_prompt_logprobs(self, verdict: Verdict) -> Verdict:
        """The session's first verdict carries the prompt's log-probabilities, if asked for; they are kept no longer."""
        if self.prompt_logprobs is None:
            return verdict
        entries, self.prompt_logprobs = self.prompt_logprobs.entries(), None
        return replace(verdict, prompt_logprobs=entries)

    @property
    def num_uncached(self) -> int:
        """Committed tokens without K and V; 1 (the root) once the prompt is prefilled."""
        return len(self.token_ids) - self.slots.num_cached

    def chain_segment(self, num_tokens: int) -> Segment:
        """Rows for the next uncached tokens, each seeing what comes before it and itself."""
        start = self.slots.num_cached
        positions = range(start, start + num_tokens)
        slots = self.slots.extend(num_tokens)
        visible = [position + 1 for position in positions]
        return Segment(self.token_ids[start : start + num_tokens], positions, slots, visible, self.slots.by_position)

    def tree_segment(self, tree: TokenTree) -> Segment:
        """Rows for every uncached token, the last one being the root, and for the nodes, which have `tree_slots`."""
        chain = self.chain_segment(self.num_uncached)
        if not tree.token_ids:
            return chain
        root_position = len(self.token_ids) - 1
        last_position = self.limits.max_total_length - 1  # deeper nodes can never be emitted
        positions = [min(root_position + depth, last_position) for depth in tree.row_depths[1:]]
        num_chain, num_nodes = len(chain), len(tree)
        visible = np.zeros((num_chain + num_nodes, num_nodes), dtype=np.bool_)
        for node, parent_row in enumerate(tree.parent_rows):
            if parent_row > 0:
                visible[num_chain + node] = visible[num_chain + parent_row - 1]
            visible[num_chain + node, node] = True
        return Segment(
            token_ids=[*chain.token_ids, *tree.token_ids],
            positions=[*chain.positions, *positions],
            slots=[*chain.slots, *self.tree_slots],
            num_visible=[*chain.num_visible, *([root_position + 1] * num_nodes)],
            slots_by_position=chain.slots_by_position,
            tree=TreeColumns(self.tree_slots, positions, visible),
        )


class Verifier:
    """Steps over batches of sessions: all trees that are ready at once, then one chunk of one prompt."""

    def __init__(
        self, decoder: Decoder, pool: KVPool, limits: VerifierLimits, on_step: StepObserver = ignore_step
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._limits = limits
        self._on_step = on_step
        self._sessions: dict[int, VerifierSession] = {}
        self._session_ids = itertools.count(1)
        self._ready: list[VerifierSession] = []
        self._prefilling: list[VerifierSession] = []

    def usage(self) -> KvUsage:
        """KV memory as it is now; may be read from another thread."""
        return KvUsage(self._pool.num_slots, self._pool.num_used_slots, len(self._sessions))

    def accept(self, task: Task[Any]) -> None:
        """Open, queue or close; an error that the caller made is the answer to that task alone."""
        try:
            if isinstance(task, OpenTask):
                task.finish(self._open(task.request, task.grammar))
            elif isinstance(task, VerifyTask):
                self._enqueue(task)
            elif isinstance(task, CloseTask):
                self._close(task.session_id)
        except EasyspecError as error:
            task.fail(error)

    def step(self) -> bool:
        """One pass over every tree that is ready, then one prompt chunk; True if something is still waiting."""
        with torch.inference_mode():
            if self._ready:
                self._verify(self._next_batch())
            if self._prefilling:
                self._advance(self._prefilling.pop(0))
        return bool(self._ready or self._prefilling)

    def abandon(self, error: BaseException) -> None:
        """Fail every waiting task and end its session, whose KV may be half written."""
        for session in [*self._sessions.values()]:
            if session.waiting is not None:
                session.waiting.fail(error)
                session.waiting, session.is_finished = None, True
        self._ready.clear()
        self._prefilling.clear()

    def _open(self, request: OpenVerification, compiled: CompiledGrammar | None) -> int:
        config = self._decoder.config
        check_model(request.model, self._limits.served_model_name)
        check_prompt(request.prompt_token_ids, config.vocab_size, config.max_model_len)
        check_token_ids("output_token_ids", request.output_token_ids, config.vocab_size)
        request.sampling.check(config.vocab_size)
        request.stop.check(config.vocab_size)
        num_prompt, num_output = len(request.prompt_token_ids), len(request.output_token_ids)
        # Where a grammar allows an end of sequence it means it (see `grammar.py`).
        stop = request.stop if compiled is None else replace(request.stop, ignore_eos=False)
        limits = stop_limits(stop, num_prompt, config.eos_token_ids, config.max_model_len)
        if num_prompt + num_output >= limits.max_total_length:
            raise InvalidRequestError("output_token_ids", f"{num_output} tokens", "fewer than max_tokens")
        has_prompt = request.prompt_logprobs
        check_logprobs(request.num_top_logprobs, has_prompt=has_prompt, num_prompt_tokens=num_prompt)
        grammar = None if compiled is None else _replayed(compiled, request)
        slots = SessionSlots(self._pool, limits.max_total_length + self._limits.max_tree_nodes, BLOCK_SIZE)
        session_id = next(self._session_ids)
        self._sessions[session_id] = VerifierSession(request, limits, slots, grammar)
        return session_id

    def _enqueue(self, task: VerifyTask) -> None:
        session = self._sessions.get(task.session_id)
        if session is None or session.is_finished:
            raise InvalidRequestError("session", task.session_id, "an open session that has not finished")
        if session.waiting is not None or task.base_length != len(session.token_ids):
            raise StalePositionError(task.base_length, len(session.token_ids))
        task.tree.check(self._decoder.config.vocab_size, self._limits.max_tree_nodes)
        session.waiting = task
        (self._ready if session.num_uncached == 1 else self._prefilling).append(session)

    def _close(self, session_id: int) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._pool.free(session.tree_slots)
            session.slots.release()
            self._ready = [other for other in self._ready if other is not session]
            self._prefilling = [other for other in self._prefilling if other is not session]

    def _next_batch(self) -> list[VerifierSession]:
        """As many ready sessions as fit a step, first come first served."""
        batch: list[VerifierSession] = []
        num_rows = 0
        while self._ready:
            waiting = self._ready[0].waiting
            assert waiting is not None, "a ready session waits for a verdict"
            num_rows += len(waiting.tree) + 1
            if batch and num_rows > self._limits.max_batch_rows:
                break
            batch.append(self._ready.pop(0))
        return batch

    def _advance(self, session: VerifierSession) -> None:
        """Prefill one chunk; the last chunk carries the tree too."""
        if session.num_uncached > self._limits.prefill_chunk:
            started_ns = time.monotonic_ns()
            layout = self._decoder.lay_out([session.chain_segment(self._limits.prefill_chunk)])
            hidden = self._decoder.forward(layout, self._pool)
            if session.prompt_logprobs is not None:
                session.prompt_logprobs.add(self._decoder, hidden[: self._limits.prefill_chunk])
            self._on_step(StepReport("prefill", time.monotonic_ns() - started_ns, self._limits.prefill_chunk, 1))
            self._prefilling.append(session)
        else:
            self._verify([session])

    def _verify(self, batch: Sequence[VerifierSession]) -> None:
        """One pass over the batch, then a verdict for each session."""
        started_ns = time.monotonic_ns()
        trees: list[TokenTree] = []
        segments: list[Segment] = []
        for session in batch:
            assert session.waiting is not None, "a batched session waits for a verdict"
            tree = session.waiting.tree
            trees.append(tree)
            session.tree_slots = self._pool.allocate(len(tree))
            segments.append(session.tree_segment(tree))
        layout = self._decoder.lay_out(segments)
        hidden = self._decoder.forward(layout, self._pool)
        cases: list[Case] = []
        rows: list[int] = []
        for index, (session, segment, tree) in enumerate(zip(batch, segments, trees, strict=True)):
            root = layout.flat_row(index, len(segment) - len(tree) - 1)
            if session.prompt_logprobs is not None:
                session.prompt_logprobs.add(self._decoder, hidden[layout.flat_row(index, 0) : root + 1])
            cases.append(session.case(tree, first_row=len(rows)))
            rows += range(root, root + len(tree) + 1)
        logits = self._decoder.logits(hidden[torch.tensor(rows, device=hidden.device)])
        outcomes = decide(logits, cases)
        compute_ns = time.monotonic_ns() - started_ns
        self._on_step(StepReport("verify", compute_ns, sum(map(len, segments)), len(batch)))
        for session, outcome in zip(batch, outcomes, strict=True):
            task, session.waiting = session.waiting, None
            assert task is not None, "still the same task"
            if isinstance(outcome, EasyspecError):
                self._give_up(session)
                task.fail(outcome)
                continue
            self._commit(session, outcome)
            timings = VerifyTimings(started_ns - task.arrived_ns, compute_ns, len(rows), len(batch))
            task.finish((session.with_prompt_logprobs(outcome), timings))

    def _give_up(self, session: VerifierSession) -> None:
        """Nothing more will come of the session: free the tree, and wait to be closed."""
        self._pool.free(session.tree_slots)
        session.tree_slots, session.is_finished = [], True

    def _commit(self, session: VerifierSession, verdict: Verdict) -> None:
        """Accepted nodes keep their slots as committed positions; the others are freed. Nothing is copied."""
        tree_slots, session.tree_slots = session.tree_slots, []
        kept = [tree_slots[row - 1] for row in verdict.accepted_rows]
        self._pool.free(sorted(set(tree_slots) - set(kept)))
        session.slots.append(kept)
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
