"""What a guesser says about the next token, before anybody asks how often it is right."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass

from easyspec.speculation.host_noise import PositionNoise
from easyspec.speculation.parameters import SamplingParameters

NUM_EVIDENCE_CLASSES = 5
"""Evidence is a class 0 (a hint) to 4 (as good as it gets): how much stands behind a prediction."""

NUM_CANDIDATES = 8
"""Most candidates of one guesser after one path."""

_MIN_TEMPERATURE = 1e-3
_MIN_PROBABILITY = 1e-6
_MEAN_NOISE = 0.5772
_MIN_STATED = 0.005


@dataclass(frozen=True)
class Prediction:
    """Candidates for the next token, likeliest first, with the guesser's own probabilities: at most 1 in all."""

    probabilities: Mapping[int, float]
    evidence: int


def best(probabilities: Mapping[int, float], evidence: int) -> Prediction:
    """The likeliest candidates; ties go to the lower token id."""
    if len(probabilities) > 1:
        kept = heapq.nsmallest(NUM_CANDIDATES, probabilities.items(), key=lambda item: (-item[1], item[0]))
        probabilities = dict(kept)
    return Prediction(probabilities, evidence)


def coupled(prediction: Prediction, sampling: SamplingParameters, noise: PositionNoise) -> dict[int, float]:
    """How likely each candidate is chosen, given the noise that the verifier will choose with.

    The verifier takes the best of log-probability / temperature + noise. What is not among the candidates competes
    as one more, with the noise that is expected of it. Greedy requests have no noise.
    """
    if sampling.is_greedy:
        return _likely(prediction.probabilities)
    temperature = max(sampling.temperature, _MIN_TEMPERATURE)
    scores = {
        token_id: math.log(max(probability, _MIN_PROBABILITY)) / temperature + noise(token_id)
        for token_id, probability in prediction.probabilities.items()
    }
    rest = max(1.0 - sum(prediction.probabilities.values()), _MIN_PROBABILITY)
    rest_score = math.log(rest) / temperature + _MEAN_NOISE
    top = max(rest_score, *scores.values())
    weights = {token_id: math.exp(score - top) for token_id, score in scores.items()}
    total = sum(weights.values()) + math.exp(rest_score - top)
    return _likely({token_id: weight / total for token_id, weight in weights.items()})


def _likely(probabilities: Mapping[int, float]) -> dict[int, float]:
    """Those worth a look."""
    return {token_id: value for token_id, value in probabilities.items() if value >= _MIN_STATED}
