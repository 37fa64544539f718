"""The drafter's core: sessions, their sources, and batches of rounds. Runs on the device thread."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from drafter_service.fusion.acceptance_estimate import Judge
from drafter_service.fusion.rounds import Rounds
from drafter_service.request import DrafterLimits
from drafter_service.session import DraftTask, Learned, OpenTask, Session
from drafter_service.text.guessers import NO_RESOURCES, TextDrafting, TextResources
from drafter_service.worth import ByTarget, RoundChoices
from easyspec.engine.device_thread import Task
from easyspec.engine.shell import CloseTask
from easyspec.errors import CapacityError, EasyspecError, InvalidRequestError, StalePositionError
from easyspec.speculation.checks import check_token_ids
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.messages import Calibration, Draft, DraftTimings, KvUsage, OpenSpeculation
from easyspec.telemetry.metrics import StepObserver, StepReport, ignore_step

if TYPE_CHECKING:  # a drafter without a model has no torch
    from drafter_service.model.ahead import AheadDrafting
    from drafter_service.model.drafting import ModelDrafting
    from drafter_service.model.state import ModelState

_EVICTED = "KV memory is full: this session's slots were taken back for older ones"


class Drafter:
    """Steps over batches: sessions draft together, each joining when its verdict has come."""

    def __init__(
        self,
        limits: DrafterLimits,
        rounds: Rounds,
        resources: TextResources = NO_RESOURCES,
        model: ModelDrafting | None = None,
        ahead: AheadDrafting | None = None,
        grammars: GrammarCompiler | None = None,
        on_step: StepObserver = ignore_step,
    ) -> None:
        self._limits = limits
        self._rounds = rounds
        self._resources = resources
        self._model = model
        self._ahead = ahead
        self._grammars = grammars
        self._on_step = on_step
        self._learned = ByTarget(Learned)
        self._sessions: dict[int, Session] = {}  # in the order of their age
        self._session_ids = itertools.count(1)
        self._evicted: set[int] = set()

    @property
    def max_model_len(self) -> int:
        """Most tokens a session can hold."""
        return self._limits.max_model_len

    def usage(self) -> KvUsage:
        """KV memory as it is now; may be read from another thread."""
        num_sessions = len(self._sessions)
        return KvUsage(0, 0, num_sessions) if self._model is None else self._model.memory.usage(num_sessions)

    def accept(self, task: Task[Any]) -> None:
        """Open, commit or close; an error that the caller made is the answer to that task alone."""
        try:
            if isinstance(task, OpenTask):
                session_id = self._open(task.request)
                if not task.finish(session_id):  # its request has gone, and no other knows of it
                    self._close(session_id)
            elif isinstance(task, DraftTask):
                self._commit(task)
            elif isinstance(task, CloseTask):
                self._close(task.session_id)
        except EasyspecError as error:
            task.fail(error)

    def step(self) -> bool:
        """One piece of work for every session that has some; True if there is more."""
        started_ns = time.monotonic_ns()
        for session in self._sessions.values():
            if session.task is not None and session.task.begun_ns is None:
                session.task.begun_ns = started_ns
                self._begin(session, session.task.calibration)
        for session in self._sessions.values():
            if session.text is not None and not session.text.has_read_prompt:
                session.text.read()
        if self._model is not None:
            by_state = {id(session.model): session for session in self._sessions.values()}
            # Sessions whose slots went to older ones are over: they learn so at once, or when they ask for a tree.
            for state in self._model.step(self._states()):
                session = by_state[id(state)]
                session.model = None
                self._break(session, CapacityError(_EVICTED))
                self._evicted.add(session.session_id)
        drafted = [session for session in self._sessions.values() if session.is_drafted]
        num_rows = sum(self._answer(session) for session in drafted)
        has_more = any(session.is_busy for session in self._sessions.values())
        # As none waits for the device.
        is_going_ahead = not has_more and self._ahead is not None and self._ahead.step(self._states())
        duration_ns = time.monotonic_ns() - started_ns
        if drafted:
            self._on_step(StepReport("draft", duration_ns, num_rows, len(drafted)))
        elif has_more:
            self._on_step(StepReport("prefill", duration_ns, 0, 0))
        return has_more or is_going_ahead

    def _begin(self, session: Session, calibration: Calibration) -> None:
        # The deepest level whose expanded nodes still have a position in the draft model's context.
        levels = min(calibration.budget.num_levels, self.max_model_len - len(session.token_ids) + 1)
        budget = replace(calibration.budget, num_levels=levels)
        round_ = self._rounds.begin(session, len(calibration.token_ids), budget, len(self._sessions))
        state = session.model
        if self._model is None or state is None:
            return
        if not round_.has_model:
            state.drop_ahead()
            return
        said, ahead = state.said_since, state.ahead
        state.ahead = None
        self._model.begin(state, budget, session.choices.token_time.seconds)
        if ahead is not None:
            ahead.take_up(state, said, budget)

    def _states(self) -> list[ModelState]:
        """What the draft model holds, of the oldest session first."""
        return [session.model for session in self._sessions.values() if session.model is not None]

    def _answer(self, session: Session) -> int:
        """Answer the session's task with its tree; returns the rows of the round."""
        task, session.task = session.task, None
        assert task is not None, "it is drafted"
        tree, node_sources = self._rounds.finish(session)
        timings, state, round_ = DraftTimings(), session.model, session.round
        if state is not None and state.timings is not None and round_ is not None:
            timings, state.timings = state.timings, None
            if self._ahead is not None and session.choices.ahead.is_on and session.request.drafts_ahead:
                round_.went_ahead = self._ahead.begin(state, round_.sent, round_.budget)
        timings = replace(timings, queue_ns=(task.begun_ns or task.arrived_ns) - task.arrived_ns)
        task.finish(Draft(len(session.token_ids), tree, timings, node_sources))
        return len(task.calibration.token_ids) + len(tree)

    def abandon(self, error: BaseException) -> None:
        """End every session with work or a waiting task, whose KV may be half written, and fail the tasks."""
        for state in self._states():
            state.drop_ahead()
        for session in [session for session in self._sessions.values() if session.is_busy]:
            if session.model is not None:
                session.model.give_up()
                session.model = None
            self._break(session, error)

    def _break(self, session: Session, error: BaseException) -> None:
        """End a session; fail its task, if it has one."""
        task = session.task
        self._close(session.session_id)
        if task is not None:
            task.fail(error)

    def _open(self, opening: OpenSpeculation) -> int:
        """A new session with what it asks for; raises the EasyspecError that it deserves."""
        request, token_ids = self._limits.checked(opening, self._grammars), [*opening.prompt_token_ids]
        learned = self._learned.of(request.target)
        choices = RoundChoices(learned.greedy if request.sampling.is_greedy else learned.sampled)
        session = Session(next(self._session_ids), request, token_ids, Judge(learned.estimate), choices)
        if request.asks_model:
            assert self._model is not None, "sessions ask for sources that are here"
            session.model = self._model.open(request, token_ids, self._states())
        if request.asks_text:
            session.text = TextDrafting(self._resources, request.sources, request.sampling, token_ids)
        self._sessions[session.session_id] = session
        return session.session_id

    def _commit(self, task: DraftTask) -> None:
        """Append the verdict's tokens; the stale and the malformed change nothing."""
        calibration = task.calibration
        session = self._sessions.get(task.session_id)
        if task.session_id in self._evicted:
            raise CapacityError(_EVICTED)
        if session is None:
            raise InvalidRequestError("session", task.session_id, "an open session")
        if session.task is not None or calibration.base_length != len(session.token_ids):
            raise StalePositionError(calibration.base_length, len(session.token_ids))
        if not calibration.token_ids:
            raise InvalidRequestError("calibration.token_ids", [], "at least the bonus token")
        check_token_ids("calibration.token_ids", calibration.token_ids, self._limits.vocab_size)
        length, most = len(session.token_ids) + len(calibration.token_ids), session.request.max_length
        if length > most:
            raise InvalidRequestError("calibration.token_ids", f"{length} tokens", f"{most} in all")
        self._limits.check_budget(calibration.budget)
        session.token_ids.extend(calibration.token_ids)
        session.task = task

    def _close(self, session_id: int) -> None:
        self._evicted.discard(session_id)
        session = self._sessions.pop(session_id, None)
        if session is not None:
            session.close()
