"""The draft model's tree, as one guesser among others."""

from __future__ import annotations

import math

from drafter_service.acceptance_estimate import Guesser, Stated
from easyspec.speculation.token_tree import ScoredTree

# A node's evidence: how the probability was made up is the same everywhere, and levels are told apart by depth.
_EVIDENCE = 0


class ModelGuesser:
    """A PathGuesser over a tree that the draft model has grown; a cursor is a row of it.

    The tree's values contain the noise already. Rows that were not expanded have nothing to say.
    """

    kind = Guesser.MODEL

    def __init__(self, scored: ScoredTree) -> None:
        self._tree = scored.tree
        self._log_values = scored.log_values

    def root(self) -> object | None:
        return 0 if len(self._tree) else None

    def step(self, cursor: object, token_id: int) -> object | None:
        assert isinstance(cursor, int)
        return self._tree.children[cursor].get(token_id)

    def state(self, cursor: object, depth: int) -> Stated | None:
        assert isinstance(cursor, int)
        children = self._tree.children[cursor]
        if not children:
            return None
        value = self._log_values[cursor - 1] if cursor else 0.0
        return Stated(
            {token_id: math.exp(self._log_values[row - 1] - value) for token_id, row in children.items()}, _EVIDENCE
        )
