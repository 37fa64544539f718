"""Drafting that may fail: the request goes on without a guess, and the drafter is taken up again when it is back."""

from __future__ import annotations

import asyncio
import contextlib
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
from easyspec.speculation.token_tree import EMPTY_TREE
from easyspec.vocabulary import rows_note
from gateway.decode_loop import NOTHING_DRAFTED, TimedDraft
from gateway.peers import Backoff
from gateway.replicas import Replica, ReplicaSet

_log = structlog.get_logger()

# A session that was skipped for so many tokens at most catches up with the next calibration, in one short pass. After
# more it is given up, so that it holds no memory for nothing, and re-opened when it is wanted again.
_MAX_SKIPPED_TOKENS = 32
# Drafters that may be lost in a row while they draft for a session, which may be why, before it goes on without.
_MAX_DEATHS = 2
# What a re-opened session is asked for while it catches up: the answer is not used.
_CATCH_UP_BUDGET = TreeBudget(num_levels=1, width=1, num_nodes=1)


class DraftStream(Protocol):
    """One session at the drafter; raises EasyspecError once it is lost. `committed_length` is where it stands."""

    @property
    def committed_length(self) -> int: ...

    async def draft(self, calibration: Calibration) -> Draft: ...

    def cancel(self) -> None: ...


class DraftConnection(Protocol):
    """Opens streams at one replica; returns at once, and errors come with the first draft."""

    def open(self, opening: OpenSpeculation) -> DraftStream: ...


@dataclass(frozen=True)
class DraftLimits:
    """How long to wait for a tree, how long for a session to catch up after re-opening (seconds), and how long to
    leave the drafter alone after a session's failures."""

    deadline_s: float
    reopen_deadline_s: float
    backoff: Backoff


class DrafterPool:
    """The drafters as all requests share them: their state, and how to open a session."""

    def __init__(self, replicas: ReplicaSet[DraftConnection], limits: DraftLimits) -> None:
        self.replicas = replicas
        self._limits = limits
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
        session = ResilientDraftSession(self.replicas, self._limits, opening, vocab_size)
        if is_wanted:
            session.open()
        try:
            yield session
        finally:
            session.close()


class ResilientDraftSession:
    """A DraftSession that outlives the drafter.

    It either has a stream or has none. A failure or a late answer drops the stream for good, so that answers never
    get out of step, and the round goes on with the empty tree. A stream that is skipped for long is dropped as well.
    Without a stream every round is plain, at once, while a new stream is opened in the background from all committed
    tokens, as soon as a draft is wanted and the drafter is known to be there. `num_failures` counts streams lost.
    """

    def __init__(
        self,
        replicas: ReplicaSet[DraftConnection],
        limits: DraftLimits,
        opening: OpenSpeculation,
        vocab_size: int,
    ) -> None:
        self._replicas = replicas
        self._limits = limits
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
            self._replica = self._replicas.pick()
            self._stream = self._replica.client.open(self._opening)

    async def draft(self, calibration: Calibration) -> TimedDraft:
        self._history.extend(calibration.token_ids)
        self._num_skipped = 0
        stream = self._stream
        if stream is None:
            self._reopen_in_background()
            return NOTHING_DRAFTED
        started_ns = time.monotonic_ns()
        # The stream stands behind by the tokens of the rounds that went without it.
        missing = self._history[stream.committed_length :]
        try:
            draft = await self._ask(stream, missing, calibration.budget, self._limits.deadline_s)
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
        """Free the session at the drafter."""
        if self._reopening is not None:
            self._reopening.cancel()
        if self._stream is not None:
            self._stream.cancel()

    async def _ask(self, stream: DraftStream, token_ids: Sequence[int], budget: TreeBudget, deadline_s: float) -> Draft:
        base_length = stream.committed_length
        async with asyncio.timeout(deadline_s):
            draft = await stream.draft(Calibration(base_length, tuple(token_ids), budget))
        if draft.base_length != base_length + len(token_ids):
            raise StalePositionError(draft.base_length, base_length + len(token_ids))
        draft.tree.check(self._vocab_size, budget.num_nodes)
        self._num_deaths = 0
        return draft

    def _reopen_in_background(self) -> None:
        may_try = self._replicas.is_ready and not self._is_given_up and time.monotonic() >= self._retry_at_s
        if may_try and self._reopening is None:
            self._reopening = asyncio.create_task(self._reopen())

    async def _reopen(self) -> None:
        history = tuple(self._history)
        self._replica = self._replicas.pick(avoiding=[self._replica] if self._replica is not None else [])
        committed = history[:-1]
        num_output_tokens = len(committed) - len(self._opening.prompt_token_ids)
        opening = replace(self._opening, prompt_token_ids=committed, num_output_tokens=num_output_tokens)
        stream = self._replica.client.open(opening)
        try:
            await self._ask(stream, history[-1:], _CATCH_UP_BUDGET, self._limits.reopen_deadline_s)
        except (EasyspecError, TimeoutError) as error:
            self._lose(stream, error)
        except BaseException:
            stream.cancel()
            raise
        else:
            self._stream = stream
        finally:
            self._reopening = None

    def _lose(self, stream: DraftStream, error: Exception) -> None:
        stream.cancel()
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
