"""The source of sources: the draft model, if there is one, and text sources, fused into one tree a job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from drafter_service.early_exit.provenance import told_apart
from drafter_service.fusion.fused_drafting import FusedDrafting
from drafter_service.fusion.model_guesses import ModelGuesser
from drafter_service.fusion.text_use import tokens_by
from drafter_service.fusion.union import AllowedAfter, FusedTree
from drafter_service.source import DraftJob, DraftSession, DraftSource, Progress, Proposal
from easyspec.speculation.messages import DraftTimings
from easyspec.speculation.sources import MODEL_SOURCES, TEXT_SOURCES, DraftSources
from easyspec.speculation.token_tree import TokenTree

# Of the tree of text alone that is made before the model is asked: enough to tell a copy from a guess. A round that may
# have no more nodes is drafted by it, if the model sits out; with more, what text alone would have come to is
# underestimated by what nodes beyond these bring.
_NUM_TRIAL_NODES = 16
_NO_PROGRESS = Progress((), (), has_more=False)


@dataclass
class _Round:
    """A session's latest round: who takes part, since when, how long text worked, and the trees that text and the model
    would have sent alone."""

    begun_ns: int
    has_model: bool = True
    has_text: bool = True
    text_tree: FusedTree | None = None
    text_ns: int = 0
    model_tree: TokenTree | None = None
    answered_ns: int | None = None


class FusingSource:
    """A DraftSource. Sessions that ask the model alone get the model's tree as it is.

    Of those that ask both, rounds that text alone drafts at a better rate are drafted by text alone, and rounds in
    which text brings less than its work costs by the model alone; the other catches up in the next round that it
    takes part in. With `is_everybody_asked` nobody is left out of any round.
    """

    def __init__(self, model: DraftSource | None, fused: FusedDrafting, *, is_everybody_asked: bool = False) -> None:
        self._model = model
        self._fused = fused
        self._is_everybody_asked = is_everybody_asked
        self._rounds: dict[int, _Round] = {}
        self._num_unseen: dict[int, int] = {}  # tokens that the model has not been given, by session
        self._num_unheard: dict[int, int] = {}  # tokens that text has not been given, by session
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
        self._num_unheard.pop(session.session_id, None)
        self._unread.pop(session.session_id, None)
        self._text_jobs.pop(session.session_id, None)

    def begin(self, job: DraftJob) -> None:
        """Let text sources read and look things up; the model drafts in the steps that follow."""
        session = job.session
        if not self._asks_text(session):
            self._model_source.begin(job)
        elif not self._asks_model(session):
            self._begin_text(job)
            self._text_jobs[session.session_id] = job
        else:
            self._begin_round(job)

    def _begin_text(self, job: DraftJob) -> int | None:
        """Returns how many tokens the last tree brought, if text had a part in it."""
        session = job.session
        self._unread.pop(session.session_id, None)
        num_tokens = self._num_unheard.pop(session.session_id, 0) + job.num_new_tokens
        return self._fused.begin(session.session_id, session.token_ids[-num_tokens:])

    def _begin_round(self, job: DraftJob) -> None:
        """Let those take part who are worth their time: model, text, or both."""
        session, begun_ns = job.session, time.monotonic_ns()
        last = self._rounds.get(session.session_id)
        if last is not None and last.answered_ns is not None:
            self._learn_from(last, job, begun_ns)
        if not self._is_text_asked(session, last):
            self._rounds[session.session_id] = _Round(begun_ns, has_text=False)
            self._num_unheard[session.session_id] = self._num_unheard.get(session.session_id, 0) + job.num_new_tokens
            self._begin_model(job)
            return
        model_use = self._fused.model_use(session.session_id)
        num_brought = self._begin_text(job)
        if last is not None and last.text_tree is not None and num_brought is not None:
            said = session.token_ids[-job.num_new_tokens :]
            num_of_text = tokens_by(last.text_tree.tree, said) if last.has_model else num_brought
            model_use.observe(last.text_tree.expected_tokens, num_of_text, num_brought if last.has_model else None)
        num_nodes = min(job.budget.num_nodes, _NUM_TRIAL_NODES)
        text_tree = self._fused.draft_text(session.session_id, num_nodes, _allowed_after(session))
        has_model = self._is_everybody_asked or model_use.is_worth_it(text_tree.expected_tokens)
        text_ns = time.monotonic_ns() - begun_ns
        self._rounds[session.session_id] = _Round(begun_ns, has_model, text_tree=text_tree, text_ns=text_ns)
        if has_model:
            self._begin_model(job)
        else:
            num_unseen = self._num_unseen.get(session.session_id, 0) + job.num_new_tokens
            self._num_unseen[session.session_id] = num_unseen
            self._text_jobs[session.session_id] = job

    def _is_text_asked(self, session: DraftSession, last: _Round | None) -> bool:
        """Whether text takes part; who drafted the last round alone goes on being asked."""
        if self._is_everybody_asked or (last is not None and not last.has_model):
            return True
        return self._fused.text_use(session.session_id).is_worth_it(len(self._rounds))

    def _begin_model(self, job: DraftJob) -> None:
        num_unseen = self._num_unseen.pop(job.session.session_id, 0) + job.num_new_tokens
        self._model_source.begin(replace(job, num_new_tokens=num_unseen))

    def _learn_from(self, last: _Round, job: DraftJob, now_ns: int) -> None:
        """What the verdict says of the last round, of which text knows what it brought."""
        session_id = job.session.session_id
        assert last.answered_ns is not None, "it had a tree"
        self._fused.model_use(session_id).returned((now_ns - last.answered_ns) / 1e9)
        if last.model_tree is not None:
            num_without = tokens_by(last.model_tree, job.session.token_ids[-job.num_new_tokens :])
            self._fused.text_use(session_id).observe(job.num_new_tokens, num_without)
            self._fused.text_took(session_id, last.text_ns / 1e9, (now_ns - last.begun_ns) / 1e9)

    def step(self) -> Progress:
        """A step of the model; whoever it is done with, and who does not need it, gets a fused tree."""
        self._read_prompts()
        text_jobs, self._text_jobs = self._text_jobs, {}
        proposals = [self._fuse(job, None, DraftTimings()) for job in text_jobs.values()]
        progress = self._model.step() if self._model is not None else _NO_PROGRESS
        for proposal in progress.proposals:
            proposals.append(
                self._fuse(proposal.job, proposal, proposal.timings)
                if self._has_text(proposal.job.session)
                else self._alone(proposal)
            )
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
        begun_ns = time.monotonic_ns()
        fused = self._fused_tree(job, model)
        node_sources = fused.node_sources
        if model is not None:
            node_sources = told_apart(fused.tree, node_sources, model.tree.tree, model.early_rows)
        self._note_answer(job, model, time.monotonic_ns() - begun_ns)
        return Proposal(job, fused.scored, timings, node_sources)

    def _fused_tree(self, job: DraftJob, model: Proposal | None) -> FusedTree:
        session_id = job.session.session_id
        round_ = self._rounds.get(session_id)
        text_tree = round_.text_tree if round_ is not None else None
        if model is None and text_tree is not None and job.budget.num_nodes <= _NUM_TRIAL_NODES:
            return self._fused.keep(session_id, text_tree)
        guesser = ModelGuesser(model.tree, model.early_rows) if model is not None else None
        return self._fused.finish(session_id, guesser, job.budget.num_nodes, _allowed_after(job.session))

    def _alone(self, proposal: Proposal) -> Proposal:
        round_ = self._rounds.get(proposal.job.session.session_id)
        if round_ is not None:
            round_.answered_ns = time.monotonic_ns()
        return _named(proposal)

    def _note_answer(self, job: DraftJob, model: Proposal | None, fusing_ns: int) -> None:
        round_ = self._rounds.get(job.session.session_id)
        if round_ is None:
            return
        round_.answered_ns = time.monotonic_ns()
        round_.text_ns += fusing_ns
        if model is not None:
            round_.model_tree = model.tree.pruned(job.budget.num_nodes)
        duration_s = (round_.answered_ns - round_.begun_ns) / 1e9
        self._fused.model_use(job.session.session_id).drafted(duration_s, has_model=round_.has_model)

    def _has_text(self, session: DraftSession) -> bool:
        """Whether text takes part in the session's round."""
        round_ = self._rounds.get(session.session_id)
        return round_.has_text if round_ is not None else self._asks_text(session)

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
