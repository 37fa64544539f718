"""What grammars allow at each row of a level, over the draft model's logits.

Dimensions: `R` rows of a level, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from drafter_service.grammar_preference import NOTHING_ALLOWED, GrammarPreference
from drafter_service.model.growth import Candidates, GrowingTree
from easyspec.speculation.token_mask import mask_forbidden_

# Scores of forbidden tokens are below, those of others far above.
_FORBIDDEN_SCORE = -1e29


@dataclass(frozen=True)
class LevelMask:
    """What grammars allow at each row of a level; None where anything goes."""

    rows: Sequence[NDArray[np.uint8] | None]

    def applied(self, draft_logits: torch.Tensor) -> torch.Tensor:
        """`draft_logits` [R, V] with forbidden tokens at -inf; the same tensor where there is no grammar."""
        masked = {
            index: bits for index, bits in enumerate(self.rows) if bits is not None and bits is not NOTHING_ALLOWED
        }
        if masked:
            draft_logits = draft_logits.clone()
            mask_forbidden_(draft_logits, [*masked], [*masked.values()])
        return draft_logits

    def kept(self, candidates: Sequence[Candidates]) -> list[Candidates]:
        """Each row's candidates, ranked by those logits, without the forbidden ones; possibly none are left."""
        return [
            row_candidates if bits is None else _allowed(row_candidates, may_follow=bits is not NOTHING_ALLOWED)
            for bits, row_candidates in zip(self.rows, candidates, strict=True)
        ]


def _allowed(candidates: Candidates, *, may_follow: bool) -> Candidates:
    """The best are allowed, and what is left of the ranking is not."""
    count = sum(score > _FORBIDDEN_SCORE for score in candidates.scores) if may_follow else 0
    return Candidates(candidates.token_ids[:count], candidates.scores[:count])


def level_mask(levels: Sequence[tuple[GrammarPreference | None, Sequence[int], GrowingTree]]) -> LevelMask:
    """The mask of the next level of several trees, given each session's preference and committed tokens."""
    rows: list[NDArray[np.uint8] | None] = []
    for preference, token_ids, tree in levels:
        if preference is None:
            rows += [None] * len(tree.frontier)
        else:
            rows += preference.allowed_after(token_ids, [tree.path_token_ids(row) for row in tree.frontier])
    return LevelMask(rows)
