"""Drafting that may fail: the request goes on without a guess, and the drafter is taken up again when it is back."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from easyspec.errors import (
    CapacityError,
    ConnectionLostError,
    EasyspecError,
    InvalidRequestError,
    StalePositionError,
    UnknownModelError,
)
from easyspec.speculation.messages import Calibration, Draft, OpenSpeculation
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from easyspec.usual_time import UsualTime
from easyspec.vocabulary import rows_note
from gateway.decode_loop import NOTHING_DRAFTED, TimedDraft
from gateway.peers.peer import Backoff
from gateway.peers.replica_set import Replica, ReplicaSet

_log = structlog.get_logger()

# A session that was skipped for so many tokens at most catches up with the next calibration, in one short pass. After
# more it is given up, so that it holds no memory for nothing, and re-opened when it is wanted again.
_MAX_SKIPPED_TOKENS = 32
# Drafters that may be lost in a row while they draft for a session, which may be why, before it goes on without.
_MAX_DEATHS = 2
# A deadline follows what drafts take up to so many times the least one.
_MOST_DEADLINES = 10
# What a re-opened session is asked for while it catches up: the answer is not used.
_CATCH_UP_BUDGET = TreeBudget(num_levels=1, width=1, num_nodes=1)


class DraftStream(Protocol):
    """One session at the drafter; raises EasyspecError once it is lost. `committed_length` is where it stands."""

    committed_length: int

    async def draft(self, calibration: Calibration) -> Draft: ...

    def cancel(self) -> None: ...


class DraftConnection(Protocol):
    """Opens streams at one replica; returns at once, and errors come with the first draft."""

    def open(self, opening: OpenSpeculation) -> DraftStream: ...


@dataclass(frozen=True)
class DraftLimits:
    """How long to wait for a tree at least, how long for a session to catch up after re-opening (seconds), and how long
    to leave the drafter alone after a session's failures."""

    deadline_s: float
    reopen_deadline_s: float
    backoff: Backoff


class DrafterPool:
    """The drafters as all requests share them: their state, and how to open a session."""

    def __init__(self, replicas: ReplicaSet[DraftConnection], limits: DraftLimits) -> None:
        self.replicas = replicas
        self.limits = limits
        self.pace = DraftPace(limits.deadline_s)
        self._noted: set[tuple[int, int]] = set()

    def note_padding(self, base_rows: int) -> None:
        """Say, once, if embedding tables of a pair with one tokenizer have different sizes, which is harmless."""
        info = self.replicas.info
        if info is None or (base_rows, info.model.vocab_size) in self._noted:
            return
        self._noted.add((base_rows, info.model.vocab_size))
        note = rows_note(base_rows, info.model.vocab_size)
        if note is not None:
            _log.info("vocabularies_padded", note=note)

    @contextlib.asynccontextmanager
    async def session(
        self, opening: OpenSpeculation, vocab_size: int, *, is_wanted: bool = True
    ) -> AsyncIterator[ResilientDraftSession]:
        """A session for one request, freed at the drafter on exit. Never fails and never waits.

        The drafter is told the prompt at once if the first draft `is_wanted`, else not before one is.
        """
        self.note_padding(vocab_size)
        session = ResilientDraftSession(self, opening, vocab_size)
        if is_wanted:
            session.open()
        try:
            yield session
        finally:
            session.close()


class DraftPace:
    """How long drafts take, as all requests share it."""

    def __init__(self, least_deadline_s: float) -> None:
        self._least_s = least_deadline_s
        self._usual = UsualTime(least_deadline_s)
        self._answered_s = -math.inf

    @property
    def deadline_s(self) -> float:
        """Seconds a round waits for its draft: longer where all drafts take long."""
        return min(self._usual.bound_s, _MOST_DEADLINES * self._least_s)

    def answered(self, duration_s: float, *, has_read: bool) -> None:
        """A draft has come, late or not; a stream's first one waits for its prompt to be read."""
        if has_read:
            self._usual.learn(duration_s)
        self._answered_s = time.monotonic()

    def has_answered_since(self, started_s: float) -> bool:
        """Whether the drafter lives, whatever has become of one draft."""
        return self._answered_s >= started_s


class ResilientDraftSession:
    """A DraftSession that outlives the drafter.

    It either has a stream or has none. A failure drops the stream for good, and the round goes on with the empty tree;
    so it does when the answer is late, which is used for a later round if it still fits. A stream whose answer does
    not come at all, or that is skipped for long, is dropped as well. Without a stream every round is plain, at once,
    while a new stream is opened in the background from all committed tokens, as soon as a draft is wanted and the
    drafter is known to be there. `num_failures` counts streams lost, and late answers.
    """

    def __init__(self, pool: DrafterPool, opening: OpenSpeculation, vocab_size: int) -> None:
        self._pace = pool.pace
        self._drafted: DraftStream | None = None
        self._late: asyncio.Task[Draft] | None = None
        self._late_since_s = 0.0
        self._replicas = pool.replicas
        self._limits = pool.limits
        self._opening = opening
        self._vocab_size = vocab_size
        self._history = list(opening.prompt_token_ids)
        self._replica: Replica[DraftConnection] | None = None
        self._stream: DraftStream | None = None
        self._reopening: asyncio.Task[None] | None = None
        self._retry_at_s = 0.0
        self._is_given_up = False
        self._num_skipped = 0
        self._num_deaths = 0
        self.num_failures = 0

    def open(self) -> None:
        """Tell the drafter the prompt, in the background, if it is there."""
        if self._replicas.is_ready:
            self._replica = self._replicas.pick(prompt=self._opening.prompt_token_ids)
            self._stream = self._replica.client.open(self._opening)

    async def draft(self, calibration: Calibration) -> TimedDraft:
        self._history.extend(calibration.token_ids)
        self._num_skipped = 0
        stream = self._stream
        if stream is None:
            may_try = self._replicas.is_ready and not self._is_given_up and time.monotonic() >= self._retry_at_s
            if may_try and self._reopening is None:
                self._reopening = asyncio.create_task(self._reopen())
            return NOTHING_DRAFTED
        started_ns = time.monotonic_ns()
        try:
            if self._late is not None:
                tree = self._late_tree(self._late)
                if self._late is not None or (0 < len(tree) <= calibration.budget.num_nodes):
                    return TimedDraft(tree)
            # The stream stands behind by the tokens of the rounds that went without it.
            missing = self._history[stream.committed_length :]
            asking = asyncio.ensure_future(self._ask(stream, missing, calibration.budget))
            try:
                await asyncio.wait((asking,), timeout=self._pace.deadline_s)
            except asyncio.CancelledError:
                asking.cancel()  # `wait` leaves what it waits for running
                raise
            if not asking.done():
                self._be_late(asking)
                return TimedDraft(EMPTY_TREE, elapsed_ns=time.monotonic_ns() - started_ns)
            draft = asking.result()
        except (EasyspecError, TimeoutError) as error:
            self._lose(stream, error)
            return TimedDraft(EMPTY_TREE, elapsed_ns=time.monotonic_ns() - started_ns)
        if self._replica is not None:
            self._replica.peer.report_success()
        # Told for the statistics alone: not worth losing a session that gets it wrong.
        node_sources = draft.node_sources if len(draft.node_sources) == len(draft.tree) else ()
        return TimedDraft(draft.tree, draft.timings, time.monotonic_ns() - started_ns, node_sources)

    def skip(self, token_ids: Sequence[int]) -> None:
        self._history.extend(token_ids)
        self._num_skipped += len(token_ids)
        if self._num_skipped > _MAX_SKIPPED_TOKENS:
            self.close()
            self._stream, self._replica = None, None

    def close(self) -> None:
        if self._reopening is not None:
            self._reopening.cancel()
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if self._stream is not None:
            self._stream.cancel()

    def _be_late(self, asking: asyncio.Task[Draft]) -> None:
        """Go on without this draft. The drafter has failed only if no request gets any."""
        self._late, self._late_since_s = asking, time.monotonic()
        # Look at its exception, if there is one: else asyncio complains when nothing asks for this draft any more.
        asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.num_failures += 1
        if self._replica is not None and not self._pace.has_answered_since(self._late_since_s - self._pace.deadline_s):
            _log.warning("draft_late", request_id=self._opening.request_id)
            self._replica.peer.report_failure("late")

    def _late_tree(self, late: asyncio.Task[Draft]) -> TokenTree:
        """What a draft that was late has to say about what comes now; raises what became of it."""
        if not late.done():
            if time.monotonic() - self._late_since_s > self._limits.reopen_deadline_s:
                raise TimeoutError
            return EMPTY_TREE
        self._late = None
        draft = late.result()
        # What rounds without it committed meanwhile must be the tree's own path, else nothing of it is left.
        return draft.tree.after(self._history[draft.base_length :])

    async def _ask(self, stream: DraftStream, token_ids: Sequence[int], budget: TreeBudget) -> Draft:
        base_length, started_s = stream.committed_length, time.monotonic()
        draft = await stream.draft(Calibration(base_length, tuple(token_ids), budget))
        self._pace.answered(time.monotonic() - started_s, has_read=self._drafted is stream)
        self._drafted = stream
        if draft.base_length != base_length + len(token_ids):
            raise StalePositionError(draft.base_length, base_length + len(token_ids))
        draft.tree.check(self._vocab_size, budget.num_nodes)
        self._num_deaths = 0
        return draft

    async def _reopen(self) -> None:
        history = tuple(self._history)
        avoiding = [self._replica] if self._replica is not None else []
        self._replica = self._replicas.pick(avoiding=avoiding, prompt=self._opening.prompt_token_ids)
        # All tokens but the last open the session; the last goes as a calibration, whose answer says that all was read.
        committed = history[:-1]
        num_output_tokens = len(committed) - len(self._opening.prompt_token_ids)
        opening = replace(self._opening, prompt_token_ids=committed, num_output_tokens=num_output_tokens)
        stream = self._replica.client.open(opening)
        try:
            async with asyncio.timeout(self._limits.reopen_deadline_s):
                await self._ask(stream, history[-1:], _CATCH_UP_BUDGET)
        except (EasyspecError, TimeoutError) as error:
            self._lose(stream, error)
        except BaseException:
            stream.cancel()  # the request ended meanwhile: nothing else would free the session at the drafter
            raise
        else:
            self._stream = stream
        finally:
            self._reopening = None

    def _lose(self, stream: DraftStream, error: Exception) -> None:
        stream.cancel()
        if self._late is not None:
            self._late.cancel()
            self._late = None
        self._stream = None
        self.num_failures += 1
        self._retry_at_s = time.monotonic() + self._limits.backoff(self.num_failures)
        reason = str(error) or "late"
        _log.warning("draft_session_lost", request_id=self._opening.request_id, reason=reason)
        self._num_deaths += isinstance(error, ConnectionLostError)
        if isinstance(error, InvalidRequestError | UnknownModelError) or self._num_deaths >= _MAX_DEATHS:
            self._is_given_up = True  # the answer would be the same again
        elif self._replica is not None and not isinstance(error, CapacityError | StalePositionError):
            self._replica.peer.report_failure(reason)
