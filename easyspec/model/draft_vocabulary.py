"""The part of the vocabulary that a draft model names.

Most of a small model's weights are its head, and rare tokens are seldom guessed right: a draft model may have rows for
frequent tokens alone. The verifier's choices do not depend on it; what it cannot name is a bonus token.

Dimensions: `R` rows, `V` vocabulary, `N` tokens that are named.
"""

from __future__ import annotations

import torch

from easyspec.model.config import ModelConfig


class DraftVocabulary:
    """`token_ids`, rising, int64 [N], of a vocabulary of `vocab_size`."""

    def __init__(self, token_ids: torch.Tensor, vocab_size: int) -> None:
        self.token_ids = token_ids
        self._vocab_size = vocab_size
        self._spread = torch.empty(0, vocab_size, device=token_ids.device)

    @classmethod
    def of(cls, config: ModelConfig, device: torch.device) -> DraftVocabulary | None:
        """That of a model; None where it names all tokens."""
        if config.draft_vocabulary is None:
            return None
        return cls(torch.tensor(config.draft_vocabulary, device=device), config.vocab_size)

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """[R, N] -> [R, V] with -inf for the others; overwritten by the next call."""
        if len(logits) > len(self._spread):
            self._spread = logits.new_full((len(logits), self._vocab_size), float("-inf"))
        # The other columns never change.
        spread = self._spread[: len(logits)]
        spread[:, self.token_ids] = logits
        return spread
