"""The seam for guessers: whatever proposes tokens joins the round's tree through this interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from drafter_service.grammar_preference import GrammarPreference
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.messages import DraftTimings
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import ScoredTree


@dataclass(eq=False)
class DraftSession:
    """One request at the drafter: what every source may look at. Sources keep their own state by `session_id`.

    `token_ids` are all committed tokens, at most `max_length` of them ever. Ids grow with age: the lower, the older.
    `target` tells base models apart: what is learned about acceptance by one must not be held against another.
    """

    session_id: int
    token_ids: list[int]
    max_length: int
    sampling: SamplingParameters
    plan: LayerPlan
    calibration: bool
    sources: DraftSources = DraftSources.MODEL
    preference: GrammarPreference | None = None
    target: str = ""


@dataclass(frozen=True)
class DraftJob:
    """A session to draft for; the accepted and bonus tokens are at the end of `session.token_ids` already."""

    session: DraftSession
    num_new_tokens: int
    budget: TreeBudget


@dataclass(frozen=True)
class Proposal:
    """One source's tree for one job, with estimated log-probabilities of acceptance.

    `node_sources` says who guessed each node, where the tree is of at most the budget's nodes; empty: the model did.
    `early_rows` are the rows whose children come from an early exit of the model: which one, from 1.
    """

    job: DraftJob
    tree: ScoredTree
    timings: DraftTimings = field(default_factory=DraftTimings)
    node_sources: tuple[DraftSources, ...] = ()
    early_rows: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """What a step came to: jobs that are done, and sessions that had to give their memory to older ones.

    `has_more` says whether there is something to do before the next task comes.
    """

    proposals: Sequence[Proposal]
    evicted: Sequence[DraftSession]
    has_more: bool


class DraftSource(Protocol):
    """A guesser. All calls come from the device thread, one at a time."""

    def open(self, session: DraftSession) -> None:
        """Make room for the session; raises CapacityError if there is none."""

    def close(self, session: DraftSession) -> None:
        """Free what the session holds; idempotent."""

    def begin(self, job: DraftJob) -> None:
        """Take a job up; a later step answers it with a proposal of at most the budget's nodes."""

    def step(self) -> Progress:
        """One bounded piece of work for every session that has some: prompts, repairs after verdicts, one level."""

    def abandon(self) -> Sequence[DraftSession]:
        """A step broke: the sessions that had a part in it, whose K and V may be half written."""
