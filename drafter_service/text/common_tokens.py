"""Guesses where text knows nothing: of the corpus' commonest tokens, the ones that the noise is about to favour.

At a temperature the verifier takes the best of log-probability / temperature + noise, and the noise is known. Among
thousands of tokens the few with much noise win so often that even a distribution which ignores the text names the
next token once in six times. A greedy request has no noise, and this nothing to say.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from drafter_service.guesser import Stated
from easyspec.speculation.host_noise import PositionNoise

_NUM_FAVOURED = 6
# At least so much of the probability is left to them, whatever text claims: what a model samples hardly repeats text.
_MIN_SHARE = 0.5


class CommonTokens:
    """The corpus' commonest tokens, with their shares of it; one for all requests."""

    def __init__(self, token_ids: npt.NDArray[np.int64], shares: npt.NDArray[np.float64]) -> None:
        self._token_ids = token_ids
        self._shares = shares
        self._log_shares = np.log(shares)

    def favoured(self, temperature: float, noise: PositionNoise) -> dict[int, float]:
        """The likeliest choices at a position, with their shares."""
        scores = self._log_shares / temperature + noise.of(self._token_ids)
        first = max(0, len(scores) - _NUM_FAVOURED)
        chosen = np.argpartition(scores, first - 1)[first:] if first else np.arange(len(scores))
        return dict(zip(self._token_ids[chosen].tolist(), self._shares[chosen].tolist(), strict=True))


def beside(said: Stated | None, favoured: Mapping[int, float]) -> Stated:
    """What text says, and what it leaves open given to the favoured tokens."""
    probabilities = dict(said.probabilities) if said is not None else {}
    share = max(_MIN_SHARE, 1.0 - sum(probabilities.values()))
    for token_id, of_corpus in favoured.items():
        probabilities[token_id] = probabilities.get(token_id, 0.0) + share * of_corpus
    return Stated(probabilities, said.evidence if said is not None else 0)
