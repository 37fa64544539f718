"""The seam for guessers: whatever proposes tokens joins the round's tree through this interface."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

NUM_EVIDENCE_CLASSES = 5
"""Evidence is a class 0 (a hint) to 4 (as good as it gets): how much stands behind a prediction."""


class Guesser(enum.IntEnum):
    """Kinds of guessers."""

    MODEL = 0
    OWN_TEXT = 1
    DATASTORE = 2
    NGRAM = 3


@dataclass(frozen=True)
class Stated:
    """What a guesser says comes after a path: token -> its own probability, at most 1 in all, and its class of
    evidence."""

    probabilities: Mapping[int, float]
    evidence: int


class PathGuesser(Protocol):
    """A guesser at work on one round of one request. A cursor is its own idea of a path, None where it has none."""

    @property
    def kind(self) -> Guesser: ...

    def root(self) -> Any | None:
        """The cursor of the committed text."""

    def step(self, cursor: Any, token_id: int) -> Any | None:
        """The cursor one token further."""

    def state(self, cursor: Any, depth: int) -> Stated | None:
        """What comes next, at level `depth`; None if it does not know."""
