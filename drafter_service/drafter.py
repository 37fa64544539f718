"""The drafter's core: sessions, their sources, and batches of rounds. Runs on the device thread."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from drafter_service.sources.source import DraftJob, DraftSession, DraftSource, Proposal
from easyspec.device_thread import Task
from easyspec.errors import EasyspecError, InvalidRequestError, StalePositionError
from easyspec.model.config import ModelConfig
from easyspec.model.kv_cache import KVPool
from easyspec.parallel.layer_groups import LayerPlan, paper_plan
from easyspec.speculation.checks import check_model, check_prompt, check_token_ids
from easyspec.speculation.messages import Calibration, Draft, DraftTimings, KvUsage, OpenSpeculation
from easyspec.speculation.parameters import LayerPlanRequest, TreeBudget
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from easyspec.telemetry.metrics import StepObserver, StepReport, ignore_step


@dataclass(eq=False)
class OpenTask(Task[int]):
    """Open a session; the result is its id."""

    request: OpenSpeculation


@dataclass(eq=False)
class DraftTask(Task[Draft]):
    """Commit the verdict's tokens and draft the next tree."""

    session_id: int
    calibration: Calibration


@dataclass(eq=False)
class CloseTask(Task[None]):
    """Free a session's memory."""

    session_id: int


@dataclass(frozen=True)
class DrafterLimits:
    """What one session may ask for."""

    served_model_name: str
    max_tree_nodes: int


class Drafter:
    """Steps over batches: every session whose verdict has come drafts its next tree together with the others."""

    def __init__(
        self,
        config: ModelConfig,
        pool: KVPool,
        source: DraftSource,
        default_plan: LayerPlan,
        limits: DrafterLimits,
        on_step: StepObserver = ignore_step,
    ) -> None:
        self._config = config
        self._pool = pool
        self._source = source
        self._default_plan = default_plan
        self._limits = limits
        self._on_step = on_step
        self._sessions: dict[int, DraftSession] = {}
        self._session_ids = itertools.count(1)
        self._unprepared: list[DraftSession] = []
        self._waiting: dict[int, DraftTask] = {}

    @property
    def max_model_len(self) -> int:
        """Most tokens a session can hold."""
        return self._config.max_model_len

    def usage(self) -> KvUsage:
        """KV memory as it is now; may be read from another thread."""
        return KvUsage(self._pool.num_slots, self._pool.num_used_slots, len(self._sessions))

    def accept(self, task: Task[Any]) -> None:
        """Open, commit or close; an error that the caller made is the answer to that task alone."""
        try:
            if isinstance(task, OpenTask):
                task.finish(self._open(task.request))
            elif isinstance(task, DraftTask):
                self._commit(task)
            elif isinstance(task, CloseTask):
                self._close(task.session_id)
        except EasyspecError as error:
            task.fail(error)

    def step(self) -> bool:
        """One round for every session that is ready, then one piece of one session's prefill."""
        with torch.inference_mode():
            unprepared = {session.session_id for session in self._unprepared}
            ready = [task for session_id, task in self._waiting.items() if session_id not in unprepared]
            if ready:
                self._draft(ready)
            if self._unprepared:
                self._prepare(self._unprepared.pop(0))
        return bool(self._unprepared or self._waiting)

    def abandon(self, error: BaseException) -> None:
        """Fail every waiting task and end its session, whose KV may be half written."""
        for session_id in [*self._waiting]:
            self._break(session_id, error)

    def _break(self, session_id: int, error: BaseException) -> None:
        """End a session whose KV may be half written; fail its task, if it has one."""
        if session_id in self._waiting:
            self._waiting[session_id].fail(error)
        self._close(session_id)

    def _prepare(self, session: DraftSession) -> None:
        started_ns = time.monotonic_ns()
        try:
            is_prepared = self._source.prepare(session)
        except Exception as error:
            self._break(session.session_id, error)
            raise
        self._on_step(StepReport("prefill", time.monotonic_ns() - started_ns, 0, 1))
        if not is_prepared:
            self._unprepared.append(session)

    def _open(self, request: OpenSpeculation) -> int:
        config = self._config
        check_model(request.model, self._limits.served_model_name)
        check_prompt(request.prompt_token_ids, config.vocab_size, config.max_model_len)
        request.sampling.check(config.vocab_size)
        session = DraftSession(
            session_id=next(self._session_ids),
            token_ids=[*request.prompt_token_ids],
            max_length=self._max_length(request),
            sampling=request.sampling,
            plan=self._plan(request.layer_plan),
            calibration=request.layer_plan.calibration,
        )
        self._source.open(session)
        self._sessions[session.session_id] = session
        self._unprepared.append(session)
        return session.session_id

    def _plan(self, request: LayerPlanRequest) -> LayerPlan:
        if request.layer_parallel_size is None:
            return replace(self._default_plan, mlp=request.mlp or self._default_plan.mlp)
        mlp = request.mlp or self._default_plan.mlp
        return paper_plan(self._config.num_layers, request.layer_parallel_size, mlp)

    def _max_length(self, request: OpenSpeculation) -> int:
        """Most tokens the session can come to hold."""
        wanted = request.max_total_length or self._config.max_model_len
        return min(max(wanted, len(request.prompt_token_ids)), self._config.max_model_len)

    def _commit(self, task: DraftTask) -> None:
        """Append the verdict's tokens; the stale and the malformed change nothing."""
        calibration = task.calibration
        session = self._sessions.get(task.session_id)
        if session is None:
            raise InvalidRequestError("session", task.session_id, "an open session")
        if task.session_id in self._waiting or calibration.base_length != len(session.token_ids):
            raise StalePositionError(calibration.base_length, len(session.token_ids))
        if not calibration.token_ids:
            raise InvalidRequestError("calibration.token_ids", [], "at least the bonus token")
        check_token_ids("calibration.token_ids", calibration.token_ids, self._config.vocab_size)
        if len(session.token_ids) + len(calibration.token_ids) > session.max_length:
            length = len(session.token_ids) + len(calibration.token_ids)
            raise InvalidRequestError("calibration.token_ids", f"{length} tokens", f"{session.max_length} in all")
        self._check_budget(calibration.budget)
        session.token_ids.extend(calibration.token_ids)
        self._waiting[task.session_id] = task

    def _check_budget(self, budget: TreeBudget) -> None:
        most = self._limits.max_tree_nodes
        budget.check(most)
        if budget.width * (budget.num_levels - 1) > most:
            raise InvalidRequestError("budget.width", budget.width, f"width x (num_levels - 1) up to {most}")

    def _close(self, session_id: int) -> None:
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._source.close(session)
            self._unprepared = [other for other in self._unprepared if other is not session]
            self._waiting.pop(session_id, None)

    def _draft(self, tasks: Sequence[DraftTask]) -> None:
        started_ns = time.monotonic_ns()
        jobs: dict[int, DraftJob] = {}
        for index, task in enumerate(tasks):
            job = self._job(task)
            if job is not None:
                jobs[index] = job
        proposals = dict(zip(jobs, self._source.propose([*jobs.values()]), strict=True)) if jobs else {}
        num_rows = 0
        for index, task in enumerate(tasks):
            del self._waiting[task.session_id]
            length = len(self._sessions[task.session_id].token_ids)
            proposal = proposals.get(index)
            tree, timings = self._answer(task, proposal)
            task.finish(Draft(length, tree, replace(timings, queue_ns=started_ns - task.arrived_ns)))
            num_rows += len(task.calibration.token_ids) + len(tree)
        self._on_step(StepReport("draft", time.monotonic_ns() - started_ns, num_rows, len(tasks)))

    def _job(self, task: DraftTask) -> DraftJob | None:
        """What to ask of the source; None where the draft model's context is full."""
        session = self._sessions[task.session_id]
        room = self._max_level(session)
        if room < 1:
            return None
        budget = task.calibration.budget
        budget = replace(budget, num_levels=min(budget.num_levels, room))
        return DraftJob(session, len(task.calibration.token_ids), budget)

    def _max_level(self, session: DraftSession) -> int:
        """Deepest level whose expanded nodes still have a position in the draft model's context."""
        return self._config.max_model_len - len(session.token_ids) + 1

    def _answer(self, task: DraftTask, proposal: Proposal | None) -> tuple[TokenTree, DraftTimings]:
        if proposal is None:
            return EMPTY_TREE, DraftTimings()
        return proposal.tree.pruned(task.calibration.budget.num_nodes), proposal.timings
