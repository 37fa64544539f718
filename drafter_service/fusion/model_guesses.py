"""The draft model's tree, as one guesser among others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from drafter_service.guesser import NUM_EVIDENCE_CLASSES, Guesser, Stated
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import ScoredTree, TokenTree

# A node's evidence is the exit that named it, 0 being all layers: shallow exits are right less often.
_WHOLE_MODEL = 0


class ModelGuesser:
    """A PathGuesser over a tree that the draft model has grown; a cursor is a row of it.

    The tree's values contain the noise already. Rows that were not expanded have nothing to say. `early_rows` are those
    whose children an early exit named, and which.
    """

    kind = Guesser.MODEL

    def __init__(self, scored: ScoredTree, early_rows: Mapping[int, int] = MappingProxyType({})) -> None:
        self.scored = scored
        self._tree = scored.tree
        self._log_values = scored.log_values
        self._early_rows = early_rows

    def root(self) -> int | None:
        return 0 if len(self._tree) else None

    def step(self, cursor: int, token_id: int) -> int | None:
        return self._tree.child(cursor, token_id)

    def state(self, cursor: int, depth: int) -> Stated | None:
        children = self._tree.children[cursor]
        if not children:
            return None
        value = self._log_values[cursor - 1] if cursor else 0.0
        evidence = min(self._early_rows.get(cursor, _WHOLE_MODEL), NUM_EVIDENCE_CLASSES - 1)
        return Stated(
            {token_id: math.exp(self._log_values[row - 1] - value) for token_id, row in children.items()}, evidence
        )

    def told_apart(self, tree: TokenTree, node_sources: Sequence[DraftSources]) -> tuple[DraftSources, ...]:
        """`node_sources` of `tree` with those of the model's nodes that an early exit named named after it."""
        if not self._early_rows:
            return tuple(node_sources)
        model_rows: list[int | None] = [0]
        named = []
        for token_id, parent_row, sources in zip(tree.token_ids, tree.parent_rows, node_sources, strict=True):
            above = model_rows[parent_row]
            model_rows.append(self._tree.child(above, token_id) if above is not None else None)
            if DraftSources.MODEL in sources and above in self._early_rows:
                sources = sources & ~DraftSources.MODEL | DraftSources.EARLY_EXIT
            named.append(sources)
        return tuple(named)
