"""The source of sources: the draft model, if there is one, and text sources, fused into one tree a job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from drafter_service.fused_drafting import FusedDrafting
from drafter_service.fusion import AllowedAfter
from drafter_service.sources.exit_provenance import told_apart
from drafter_service.sources.model_guesses import ModelGuesser
from drafter_service.sources.source import DraftJob, DraftSession, DraftSource, Progress, Proposal
from easyspec.speculation.messages import DraftTimings
from easyspec.speculation.sources import MODEL_SOURCES, TEXT_SOURCES, DraftSources

# Of the tree by which text says what it expects: enough to tell a copy from a guess, and cheap.
_NUM_TRIAL_NODES = 8
_NO_PROGRESS = Progress((), (), has_more=False)


@dataclass
class _Round:
    """A session's latest round: what text expected of it, whether the model takes part, and since when."""

    expected_of_text: float
    has_model: bool
    begun_ns: int
    answered_ns: int | None = None


class FusingSource:
    """A DraftSource. Sessions that ask the model alone get the model's tree as it is.

    Of those that ask both, rounds that text alone drafts at a better rate are drafted by text alone; the model catches
    up in the next round that it takes part in.
    """

    def __init__(self, model: DraftSource | None, fused: FusedDrafting) -> None:
        self._model = model
        self._fused = fused
        self._rounds: dict[int, _Round] = {}
        self._num_unseen: dict[int, int] = {}  # tokens that the model has not been given, by session
        self._unread: dict[int, DraftSession] = {}  # prompts that text sources have not read
        self._text_jobs: dict[int, DraftJob] = {}  # begun, and not for the model

    def open(self, session: DraftSession) -> None:
        """Make room for the session; raises CapacityError if the model has none."""
        if self._asks_model(session):
            self._model_source.open(session)
        if self._asks_text(session):
            self._fused.open(session.session_id, session.token_ids, session.sampling, session.sources, session.target)
            self._unread[session.session_id] = session

    def close(self, session: DraftSession) -> None:
        """Free what the session holds; idempotent."""
        if self._asks_model(session):
            self._model_source.close(session)
        self._fused.close(session.session_id)
        self._rounds.pop(session.session_id, None)
        self._num_unseen.pop(session.session_id, None)
        self._unread.pop(session.session_id, None)
        self._text_jobs.pop(session.session_id, None)

    def begin(self, job: DraftJob) -> None:
        """Let text sources read and look things up; the model drafts in the steps that follow."""
        session = job.session
        num_brought = None
        if self._asks_text(session):
            self._unread.pop(session.session_id, None)
            num_brought = self._fused.begin(session.session_id, session.token_ids[-job.num_new_tokens :])
        if not self._asks_model(session):
            self._text_jobs[session.session_id] = job
        elif not self._asks_text(session):
            self._model_source.begin(job)
        else:
            self._begin_round(job, num_brought)

    def _begin_round(self, job: DraftJob, num_brought: int | None) -> None:
        """Let the model take part if that is worth its time."""
        session = job.session
        now_ns = time.monotonic_ns()
        model_use = self._fused.model_use(session.session_id)
        last = self._rounds.get(session.session_id)
        if last is not None and last.answered_ns is not None and num_brought is not None:
            model_use.returned((now_ns - last.answered_ns) / 1e9)
            model_use.observe(last.expected_of_text, num_brought, has_model=last.has_model)
        num_nodes = min(job.budget.num_nodes, _NUM_TRIAL_NODES)
        expected = self._fused.expected_of_text(session.session_id, num_nodes, _allowed_after(session))
        has_model = model_use.is_worth_it(expected)
        self._rounds[session.session_id] = _Round(expected, has_model, now_ns)
        num_unseen = self._num_unseen.pop(session.session_id, 0) + job.num_new_tokens
        if has_model:
            self._model_source.begin(replace(job, num_new_tokens=num_unseen))
        else:
            self._num_unseen[session.session_id] = num_unseen
            self._text_jobs[session.session_id] = job

    def step(self) -> Progress:
        """A step of the model; whoever it is done with, and who does not need it, gets a fused tree."""
        self._read_prompts()
        text_jobs, self._text_jobs = self._text_jobs, {}
        proposals = [self._fuse(job, None, DraftTimings()) for job in text_jobs.values()]
        progress = self._model.step() if self._model is not None else _NO_PROGRESS
        for proposal in progress.proposals:
            is_fused = self._asks_text(proposal.job.session)
            proposals.append(self._fuse(proposal.job, proposal, proposal.timings) if is_fused else _named(proposal))
        return Progress(proposals, progress.evicted, progress.has_more or bool(self._unread))

    def abandon(self) -> Sequence[DraftSession]:
        """The sessions that the model gives up, and those whose text was being read."""
        broken = dict(self._unread) | {job.session.session_id: job.session for job in self._text_jobs.values()}
        if self._model is not None:
            broken |= {session.session_id: session for session in self._model.abandon()}
        return [*broken.values()]

    def _read_prompts(self) -> None:
        """One piece of every prompt that is still unread."""
        self._unread = {
            session_id: session for session_id, session in self._unread.items() if not self._fused.read(session_id)
        }

    def _fuse(self, job: DraftJob, model: Proposal | None, timings: DraftTimings) -> Proposal:
        guesser = ModelGuesser(model.tree, model.early_rows) if model is not None else None
        fused = self._fused.finish(job.session.session_id, guesser, job.budget.num_nodes, _allowed_after(job.session))
        self._note_answer(job.session)
        node_sources = fused.node_sources
        if model is not None:
            node_sources = told_apart(fused.tree, node_sources, model.tree.tree, model.early_rows)
        return Proposal(job, fused.scored, timings, node_sources)

    def _note_answer(self, session: DraftSession) -> None:
        round_ = self._rounds.get(session.session_id)
        if round_ is not None:
            round_.answered_ns = time.monotonic_ns()
            duration_s = (round_.answered_ns - round_.begun_ns) / 1e9
            self._fused.model_use(session.session_id).drafted(duration_s, has_model=round_.has_model)

    @property
    def _model_source(self) -> DraftSource:
        assert self._model is not None, "sessions ask for sources that are here"
        return self._model

    def _asks_model(self, session: DraftSession) -> bool:
        return bool(session.sources & MODEL_SOURCES)

    def _asks_text(self, session: DraftSession) -> bool:
        return bool(session.sources & TEXT_SOURCES)


def _named(proposal: Proposal) -> Proposal:
    """The model's tree within the budget, each node with the exit that guessed it; as it is where none was early."""
    if not proposal.early_rows:
        return proposal
    pruned = proposal.tree.pruned_scored(proposal.job.budget.num_nodes)
    everybody = (DraftSources.MODEL,) * len(pruned.tree)
    node_sources = told_apart(pruned.tree, everybody, proposal.tree.tree, proposal.early_rows)
    return replace(proposal, tree=pruned, node_sources=node_sources)


def _allowed_after(session: DraftSession) -> AllowedAfter | None:
    """What the session's grammar lets follow a path."""
    preference = session.preference
    if preference is None:
        return None
    return lambda path: preference.allowed_after(session.token_ids, [path])[0]
