"""Log-probabilities of a prompt's own tokens, collected while it is prefilled.

Dimension key: `T` rows of the pass, `E` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from easyspec.model.decoder import Decoder, PassResult
from easyspec.speculation.logprobs import token_logprobs
from easyspec.speculation.messages import TokenLogprobs

# Rows whose logits exist at the same time: 8 MB with a vocabulary of 128 000, whatever the size of a prefill chunk.
_NUM_ROWS_AT_ONCE = 16


class PromptLogprobs:
    """One entry per prompt token but the first, in order; the `num_top` likeliest tokens in each."""

    def __init__(self, prompt_token_ids: Sequence[int], num_top: int) -> None:
        self._token_ids = prompt_token_ids
        self._num_top = num_top
        self._entries: list[TokenLogprobs] = []

    def add(self, decoder: Decoder, result: PassResult, rows: range, position: int) -> None:
        """Take `rows` of the last pass, which kept its hidden states and whose rows stand at `position` and on.

        Rows that predict no prompt token are left out, and those seen before: a preempted prompt is computed again.
        """
        rows = rows[len(self._entries) - position :]
        first = len(self._entries) + 1  # the token that the first row predicts
        rows = rows[: max(0, len(self._token_ids) - first)]
        for start in range(0, len(rows), _NUM_ROWS_AT_ONCE):
            logits = decoder.more_logits(result, rows[start : start + _NUM_ROWS_AT_ONCE])  # [<= 16, V]
            next_token_ids = self._token_ids[first + start : first + start + len(logits)]
            self._entries += token_logprobs(logits, next_token_ids, self._num_top)

    def entries(self) -> tuple[TokenLogprobs, ...]:
        return tuple(self._entries)
