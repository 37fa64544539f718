"""What a guesser says about the next token, before it is weighed by how often it is right.

Where text knows nothing, of the corpus' commonest tokens the ones are guessed that the noise is about to favour: among
thousands the few with much noise win so often that even a distribution which ignores the text names the next token once
in six times. A greedy request has no noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from drafter_service.guesser import Stated
from easyspec.speculation.host_noise import PositionNoise
from easyspec.speculation.parameters import SamplingParameters

NUM_CANDIDATES = 8
"""Most candidates of one guesser after one path."""

MIN_TEMPERATURE = 1e-3
"""Lower ones are treated as this: quotients stay finite."""

_MIN_PROBABILITY = 1e-6
_MEAN_NOISE = 0.5772
_NUM_FAVOURED = 6
# At least so much of the probability is left to them, whatever text claims: what a model samples hardly repeats text.
_MIN_SHARE = 0.5


@dataclass(frozen=True)
class Breadth:
    """How much a guesser may say after one path: the likeliest few, each with at least so much probability.

    Of a sampled request's candidates, so many of the likeliest meet their noise.
    """

    num_candidates: int
    min_stated: float
    num_noised: int


ALONE = Breadth(NUM_CANDIDATES, 0.005, 2 * NUM_CANDIDATES)
BESIDE_A_MODEL = Breadth(4, 0.02, 5)
"""What text thinks unlikely is then never worth a node, and costs time: equal lengths, a fifth less work."""


def best(probabilities: Mapping[int, float], evidence: int) -> Stated | None:
    """The likeliest candidates, if there are any; ties go to the lower token id."""
    if len(probabilities) > NUM_CANDIDATES:
        probabilities = _likeliest(probabilities, NUM_CANDIDATES)
    return Stated(probabilities, evidence) if probabilities else None


def coupled(
    said: Stated, sampling: SamplingParameters, noise: PositionNoise, breadth: Breadth = ALONE
) -> dict[int, float]:
    """How likely each candidate is chosen, given the noise that the verifier will choose with.

    The verifier takes the best of log-probability / temperature + noise. What is not among the candidates competes
    as one more, with the noise that is expected of it. Greedy requests have no noise.
    """
    probabilities = said.probabilities
    if sampling.is_greedy:
        return _likely(probabilities, breadth)
    if len(probabilities) > breadth.num_noised:
        probabilities = _likeliest(probabilities, breadth.num_noised)
    temperature = max(sampling.temperature, MIN_TEMPERATURE)
    scores = {
        token_id: math.log(max(probability, _MIN_PROBABILITY)) / temperature + noise(token_id)
        for token_id, probability in probabilities.items()
    }
    rest = max(1.0 - sum(probabilities.values()), _MIN_PROBABILITY)
    rest_score = math.log(rest) / temperature + _MEAN_NOISE
    top = max(rest_score, *scores.values())
    weights = {token_id: math.exp(score - top) for token_id, score in scores.items()}
    total = sum(weights.values()) + math.exp(rest_score - top)
    return _likely({token_id: weight / total for token_id, weight in weights.items()}, breadth)


def _likely(probabilities: Mapping[int, float], breadth: Breadth) -> dict[int, float]:
    """Those worth a look."""
    likely = {token_id: value for token_id, value in probabilities.items() if value >= breadth.min_stated}
    return likely if len(likely) <= breadth.num_candidates else _likeliest(likely, breadth.num_candidates)


def _likeliest(probabilities: Mapping[int, float], count: int) -> dict[int, float]:
    """Ties go to the lower token id."""
    ranked = sorted((-probability, token_id) for token_id, probability in probabilities.items())
    return {token_id: -negative for negative, token_id in ranked[:count]}


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
