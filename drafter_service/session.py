"""One request at the drafter, with everything that belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate, Judge
from drafter_service.fusion.union import FusedTree
from drafter_service.guesser import PathGuesser
from drafter_service.request import DraftRequest
from drafter_service.text.guessers import TextDrafting
from drafter_service.worth import RoundChoices
from easyspec.engine.device_thread import Task
from easyspec.speculation.messages import Calibration, Draft, OpenSpeculation
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.token_tree import EMPTY_TREE, ScoredTree

if TYPE_CHECKING:  # a drafter without a model has no torch
    from drafter_service.model.state import ModelState


NOTHING_SENT = ScoredTree(EMPTY_TREE, ())


@dataclass(eq=False)
class OpenTask(Task[int]):
    """Open a session; the result is its id."""

    request: OpenSpeculation


@dataclass(eq=False)
class DraftTask(Task[Draft]):
    """Commit the verdict's tokens and draft the next tree, which has begun at `begun_ns`, if it has."""

    session_id: int
    calibration: Calibration
    begun_ns: int | None = None


@dataclass(frozen=True)
class Learned:
    """What is known of one base model, from greedy and from sampled requests: numbers about guesses and rounds only."""

    estimate: AcceptanceEstimate = field(default_factory=AcceptanceEstimate)
    greedy: RoundChoices = field(default_factory=RoundChoices)
    sampled: RoundChoices = field(default_factory=RoundChoices)


@dataclass
class Round:
    """A round: whether model and text take part, since when, and how long they worked.

    Its kinds are by what was retrieved, and by what text expects; no node is worth less than `least_value`. `text_tree`
    and `model_tree` are what either would have sent alone, `fused` is the tree of all guesses, if text took part;
    `adds_ngrams`: beside what was retrieved.
    """

    budget: TreeBudget
    begun_ns: int
    least_value: float
    has_model: bool
    has_text: bool
    looked_up_ns: int
    guessers: Sequence[PathGuesser] = ()
    text_kind: int = 0
    adds_ngrams: bool = False
    ngram_ns: int = 0
    text_tree: FusedTree | None = None
    kind: int = 0
    text_ns: int = 0
    model_tree: ScoredTree | None = None
    model_ns: int = 0
    fused: FusedTree | None = None
    fuse_ns: int = 0
    sent: ScoredTree = NOTHING_SENT
    sent_ns: int = 0
    went_ahead: bool = False


@dataclass(eq=False)
class Session:
    """A session; `token_ids` are all committed tokens. Ids grow with age: the lower, the older.

    `judge` and `choices` are what it has learned. `model` and `text` are there where the request asks them, `round` is
    the one under way or the last, `task` waits for the tree of the one under way.
    """

    session_id: int
    request: DraftRequest
    token_ids: list[int]
    judge: Judge
    choices: RoundChoices
    model: ModelState | None = None
    text: TextDrafting | None = None
    round: Round | None = None
    task: DraftTask | None = None

    @property
    def is_busy(self) -> bool:
        """Whether there is something to do for it: a tree, or a prompt to read."""
        is_reading = self.model is not None and (self.model.num_unread > 0 or self.model.is_in_pass)
        return self.task is not None or is_reading or (self.text is not None and not self.text.has_read_prompt)

    @property
    def is_drafted(self) -> bool:
        """Whether its tree can be made: the draft model has grown its part, or has none in it."""
        if self.task is None or self.round is None:
            return False
        return not self.round.has_model or self.model is None or self.model.is_done

    def close(self) -> None:
        """Free what it holds; idempotent."""
        if self.model is not None:
            self.model.close()
            self.model = None
