"""Between a base's token ids and a draft model whose vocabulary shares most of them.

Only ids that mean the same in both are drafted. In what the model reads, a stand-in takes the place of the others: the
guess behind it may be worse, and what is said stays the same.

Dimensions: `R` rows, `V` rows of the draft model's embedding table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch


class VocabularyBridge:
    """`base` and `draft` are tokens by id; at least one of them must be shared."""

    def __init__(self, base: Mapping[int, str], draft: Mapping[int, str], num_draft_rows: int) -> None:
        self.num_ids = max(max(base) + 1, num_draft_rows)
        self._is_shared = np.zeros(self.num_ids, dtype=np.bool_)
        for token_id, token in base.items():
            self._is_shared[token_id] = token_id < num_draft_rows and draft.get(token_id) == token
        self._stand_in = int(np.argmax(self._is_shared))
        self._foreign = torch.from_numpy(np.flatnonzero(~self._is_shared[:num_draft_rows]))

    def to_draft(self, token_ids: Sequence[int]) -> list[int]:
        """The ids that the draft model reads for these of the base's."""
        return [token_id if self._is_shared[token_id] else self._stand_in for token_id in token_ids]

    def masked(self, draft_logits: torch.Tensor) -> torch.Tensor:
        """A copy of logits [R, V] with -inf where an id means something else, or nothing, to the base."""
        self._foreign = self._foreign.to(draft_logits.device)
        return draft_logits.index_fill(1, self._foreign, float("-inf"))
