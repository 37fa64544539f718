"""The drafter's core: sessions, their sources, and batches of rounds. Runs on the device thread."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

from drafter_service.grammar_preference import GrammarPreference
from drafter_service.source import DraftJob, DraftSession, DraftSource, Progress, Proposal
from easyspec.engine.device_thread import Task
from easyspec.engine.shell import CloseTask
from easyspec.errors import CapacityError, EasyspecError, InvalidRequestError, StalePositionError
from easyspec.parallel.layer_groups import LayerPlan, paper_plan
from easyspec.speculation.checks import check_model, check_prompt, check_token_ids
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.messages import Calibration, Draft, KvUsage, OpenSpeculation
from easyspec.speculation.parameters import LayerPlanRequest, TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import EMPTY_TREE
from easyspec.telemetry.metrics import StepObserver, StepReport, ignore_step


@dataclass(eq=False)
class OpenTask(Task[int]):
    """Open a session; the result is its id."""

    request: OpenSpeculation


@dataclass(eq=False)
class DraftTask(Task[Draft]):
    """Commit the verdict's tokens and draft the next tree, which began at `begun_ns`."""

    session_id: int
    calibration: Calibration
    begun_ns: int = 0


@dataclass(frozen=True)
class DrafterLimits:
    """What one session may ask for; `max_model_len` is what fits the KV memory.

    `sources` guess where a session does not say who shall. `early_exits` are those of the draft model that sessions
    may use; there may be none, for the reason `no_exits_because`.
    """

    served_model_name: str
    max_model_len: int
    max_tree_nodes: int
    sources: DraftSources = DraftSources.MODEL
    early_exits: tuple[int, ...] = ()
    no_exits_because: str = ""

    @property
    def known_sources(self) -> DraftSources:
        """Those that a session may name."""
        has_more = bool(self.early_exits) and DraftSources.MODEL in self.sources
        return self.sources | DraftSources.EARLY_EXIT if has_more else self.sources


class DrafterShape(Protocol):
    """What sessions must fit: of the draft model, or of a tokenizer where there is no model."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...


class MeasuredMemory(Protocol):
    """KV memory, seen from outside."""

    def usage(self, num_sessions: int) -> KvUsage: ...


class Drafter:
    """Steps over batches: sessions draft together, each joining when its verdict has come."""

    def __init__(
        self,
        config: DrafterShape,
        memory: MeasuredMemory,
        source: DraftSource,
        default_plan: LayerPlan,
        limits: DrafterLimits,
        on_step: StepObserver = ignore_step,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self._config = config
        self._memory = memory
        self._source = source
        self._default_plan = default_plan
        self._limits = limits
        self._on_step = on_step
        self._grammars = grammars
        self._sessions: dict[int, DraftSession] = {}
        self._session_ids = itertools.count(1)
        self._evicted: set[int] = set()
        self._waiting: dict[int, DraftTask] = {}
        self._new: list[DraftTask] = []

    @property
    def max_model_len(self) -> int:
        """Most tokens a session can hold."""
        return self._limits.max_model_len

    def usage(self) -> KvUsage:
        """KV memory as it is now; may be read from another thread."""
        return self._memory.usage(len(self._sessions))

    def accept(self, task: Task[Any]) -> None:
        """Open, commit or close; an error that the caller made is the answer to that task alone."""
        try:
            if isinstance(task, OpenTask):
                session_id = self._open(task.request)
                if not task.finish(session_id):  # who asked has gone, and nobody else knows of it
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
        new, self._new = self._new, []
        for task in new:
            task.begun_ns = started_ns
            self._source.begin(self._job(task))
        progress = self._source.step()
        self._report(progress, time.monotonic_ns() - started_ns)
        for proposal in progress.proposals:
            self._answer(proposal)
        for session in progress.evicted:
            self._evict(session)
        return progress.has_more

    def _report(self, progress: Progress, duration_ns: int) -> None:
        if progress.proposals:
            rows = [each.job.num_new_tokens + len(each.tree.tree) for each in progress.proposals]
            self._on_step(StepReport("draft", duration_ns, sum(rows), len(rows)))
        elif progress.has_more:
            self._on_step(StepReport("prefill", duration_ns, 0, 0))

    def abandon(self, error: BaseException) -> None:
        """End every session that had something to do, and fail those that wait."""
        for session in self._source.abandon():
            self._break(session.session_id, error)
        for session_id in [*self._waiting]:
            self._break(session_id, error)

    def _break(self, session_id: int, error: BaseException) -> None:
        """End a session; fail its task, if it has one."""
        task = self._waiting.get(session_id)
        self._close(session_id)
        if task is not None:
            task.fail(error)

    def _evict(self, session: DraftSession) -> None:
        """The session's memory has gone to older ones. It learns so at once, or when it asks for the next tree."""
        self._break(session.session_id, _evicted())
        self._evicted.add(session.session_id)

    def _open(self, request: OpenSpeculation) -> int:
        config = self._config
        check_model(request.model, self._limits.served_model_name)
        check_prompt(request.prompt_token_ids, config.vocab_size, self.max_model_len)
        request.sampling.check(config.vocab_size)
        if request.num_output_tokens > len(request.prompt_token_ids):
            most = len(request.prompt_token_ids)
            raise InvalidRequestError("num_output_tokens", request.num_output_tokens, f"0 to {most}")
        sources = self._sources(request.sources)
        session = DraftSession(
            session_id=next(self._session_ids),
            token_ids=[*request.prompt_token_ids],
            max_length=self._max_length(request),
            sampling=request.sampling,
            plan=self._plan(request.layer_plan, sources),
            calibration=request.layer_plan.calibration,
            sources=sources,
            preference=self._preference(request),
            target=request.base_fingerprint,
        )
        self._source.open(session)
        self._sessions[session.session_id] = session
        return session.session_id

    def _preference(self, request: OpenSpeculation) -> GrammarPreference | None:
        grammar = request.sampling.grammar
        if grammar is None or self._grammars is None:
            return None
        return GrammarPreference(self._grammars, grammar, len(request.prompt_token_ids) - request.num_output_tokens)

    def _sources(self, wanted: DraftSources | None) -> DraftSources:
        if wanted is None:
            return self._limits.sources
        missing = wanted & ~self._limits.known_sources
        if missing:
            known = f"some of {', '.join(self._limits.known_sources.names)}"
            if DraftSources.EARLY_EXIT in missing and self._limits.no_exits_because:
                known += f" ({self._limits.no_exits_because})"
            raise InvalidRequestError("sources", ", ".join(wanted.names), known)
        return wanted

    def _plan(self, request: LayerPlanRequest, sources: DraftSources) -> LayerPlan:
        mlp = request.mlp or self._default_plan.mlp
        if request.layer_parallel_size is None:
            plan = replace(self._default_plan, mlp=mlp)
        else:
            plan = paper_plan(self._config.num_layers, request.layer_parallel_size, mlp)
        return plan.cut_at(self._limits.early_exits) if DraftSources.EARLY_EXIT in sources else plan

    def _max_length(self, request: OpenSpeculation) -> int:
        """Most tokens the session can come to hold."""
        wanted = request.max_total_length or self.max_model_len
        return min(max(wanted, len(request.prompt_token_ids)), self.max_model_len)

    def _commit(self, task: DraftTask) -> None:
        """Append the verdict's tokens; the stale and the malformed change nothing."""
        calibration = task.calibration
        session = self._sessions.get(task.session_id)
        if task.session_id in self._evicted:
            raise _evicted()
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
        if self._max_level(session) < 1:  # the draft model's context is full
            task.finish(Draft(len(session.token_ids), EMPTY_TREE))
            return
        self._waiting[task.session_id] = task
        self._new.append(task)

    def _check_budget(self, budget: TreeBudget) -> None:
        most = self._limits.max_tree_nodes
        budget.check(most)
        if budget.width * (budget.num_levels - 1) > most:
            raise InvalidRequestError("budget.width", budget.width, f"width x (num_levels - 1) up to {most}")

    def _close(self, session_id: int) -> None:
        self._evicted.discard(session_id)
        session = self._sessions.pop(session_id, None)
        if session is not None:
            self._source.close(session)
            self._waiting.pop(session_id, None)
            self._new = [task for task in self._new if task.session_id != session_id]

    def _job(self, task: DraftTask) -> DraftJob:
        session, budget = self._sessions[task.session_id], task.calibration.budget
        budget = replace(budget, num_levels=min(budget.num_levels, self._max_level(session)))
        return DraftJob(session, len(task.calibration.token_ids), budget)

    def _max_level(self, session: DraftSession) -> int:
        """Deepest level whose expanded nodes still have a position in the draft model's context."""
        return self.max_model_len - len(session.token_ids) + 1

    def _answer(self, proposal: Proposal) -> None:
        session = proposal.job.session
        task = self._waiting.pop(session.session_id)
        tree = proposal.tree.pruned(task.calibration.budget.num_nodes)
        timings = replace(proposal.timings, queue_ns=task.begun_ns - task.arrived_ns)
        node_sources = proposal.node_sources or (DraftSources.MODEL,) * len(tree)
        task.finish(Draft(len(session.token_ids), tree, timings, node_sources))


def _evicted() -> CapacityError:
    return CapacityError("KV memory is full: this session's slots were taken back for older ones")
