"""The seam for guessers: whatever proposes tokens joins the round's tree through this interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.messages import DraftTimings
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.speculation.token_tree import EMPTY_TREE, ScoredTree


@dataclass(eq=False)
class DraftSession:
    """One request at the drafter: what every source may look at. Sources keep their own state by `session_id`.

    `token_ids` are all committed tokens, at most `max_length` of them ever.
    """

    session_id: int
    token_ids: list[int]
    max_length: int
    sampling: SamplingParameters
    plan: LayerPlan
    calibration: bool


@dataclass(frozen=True)
class DraftJob:
    """A session to draft for; the accepted and bonus tokens are at the end of `session.token_ids` already."""

    session: DraftSession
    num_new_tokens: int
    budget: TreeBudget


@dataclass(frozen=True)
class Proposal:
    """One source's tree for one job, with estimated log-probabilities of acceptance."""

    tree: ScoredTree
    timings: DraftTimings = field(default_factory=DraftTimings)


NO_PROPOSAL = Proposal(ScoredTree(EMPTY_TREE, ()))


class DraftSource(Protocol):
    """A guesser. All calls come from the device thread, one at a time."""

    def open(self, session: DraftSession) -> None:
        """Make room for the session; raises CapacityError if there is none."""

    def close(self, session: DraftSession) -> None:
        """Free what the session holds; idempotent."""

    def prepare(self, session: DraftSession) -> bool:
        """Do one bounded piece of the work that must precede a proposal (prefill); False if more is left."""

    def propose(self, jobs: Sequence[DraftJob]) -> list[Proposal]:
        """Repair state after the verdicts, then guess: one proposal per job, of at most the budget's nodes."""
