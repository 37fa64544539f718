"""How likely a guess is accepted, whoever made it: learned online from verdicts, so that all guessers compare.

Every guesser states a probability of its own and how much evidence it has. A curve per guesser, depth and evidence
turns that into the observed frequency of acceptance; then a mixer weighs the guessers that looked at the same place
(logistic mixing: log-odds are added with learned weights, as data compressors do). What is learned is numbers about
guessers, never about tokens: one process keeps one estimate for all requests and no text can leak through it. What is
peculiar to a request is a bias per guesser, kept with the request.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from drafter_service.sources.prediction import NUM_EVIDENCE_CLASSES


class Guesser(enum.IntEnum):
    """Who states probabilities."""

    MODEL = 0
    OWN_TEXT = 1
    DATASTORE = 2
    NGRAM = 3


NUM_GUESSERS = len(Guesser)

_FIRST_KNOT, _KNOT_DISTANCE, _NUM_KNOTS = -6.0, 1.5, 9  # log-odds
_KNOT_STRENGTH = 4.0
_MAX_KNOT_WEIGHT = 2000.0
_DEPTH_CLASS = (0, 0, 1, 1, 2)  # by depth; deeper is 2
_NUM_DEPTH_CLASSES = 3
_MIXER_RATE = 0.02
_BIAS_RATE = 0.05
_MAX_BIAS = 3.0
_MAX_LOG_ODDS = 7.0
# A guesser that looked and did not name a token: its curve is read at one place.
_UNNAMED = -4.0


@dataclass(frozen=True)
class Stated:
    """What a guesser says comes after a path: token -> its own probability, and its class of evidence."""

    probabilities: Mapping[int, float]
    evidence: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible node. `inputs` holds, per guesser of the place, its calibrated log-odds, `stated` what it said
    (None: it named others); `case` says who named it."""

    token_id: int
    probability: float
    inputs: tuple[float, ...]
    stated: tuple[float | None, ...]
    case: int


@dataclass(frozen=True, slots=True)
class JudgedPlace:
    """Every candidate after one path, with what is needed to learn from the verdict."""

    guessers: tuple[Guesser, ...]
    curves: tuple[Curve, ...]
    unnamed_curves: tuple[Curve, ...]
    candidates: tuple[Candidate, ...]


class Curve:
    """Stated log-odds -> log-odds of the observed frequency, linear between knots; starts as the identity."""

    __slots__ = ("_accepted", "_log_odds", "_tried")

    def __init__(self) -> None:
        self._log_odds = [_FIRST_KNOT + _KNOT_DISTANCE * knot for knot in range(_NUM_KNOTS)]
        self._accepted = [_KNOT_STRENGTH * _sigmoid(log_odds) for log_odds in self._log_odds]
        self._tried = [_KNOT_STRENGTH] * _NUM_KNOTS

    def __call__(self, stated: float) -> float:
        """The log-odds of being right."""
        place = (stated - _FIRST_KNOT) / _KNOT_DISTANCE
        if place <= 0.0:
            return self._log_odds[0]
        if place >= _NUM_KNOTS - 1:
            return self._log_odds[-1]
        knot = int(place)
        low = self._log_odds[knot]
        return low + (place - knot) * (self._log_odds[knot + 1] - low)

    def observe(self, stated: float, is_accepted: bool) -> None:
        """Count one verdict."""
        place = max(0.0, min(_NUM_KNOTS - 1.001, (stated - _FIRST_KNOT) / _KNOT_DISTANCE))
        knot = int(place)
        for index, weight in ((knot, 1.0 - place + knot), (knot + 1, place - knot)):
            self._tried[index] += weight
            self._accepted[index] += weight * is_accepted
            if self._tried[index] > _MAX_KNOT_WEIGHT:  # what is long ago fades
                self._tried[index] /= 2.0
                self._accepted[index] /= 2.0
            self._log_odds[index] = _log_odds(self._accepted[index] / self._tried[index])


class RequestBias:
    """How much better or worse each guesser does in this request than usually, in log-odds."""

    def __init__(self) -> None:
        self.values = [0.0] * NUM_GUESSERS


class AcceptanceEstimate:
    """Shared by the requests of one model; of fixed size once every case has come up."""

    def __init__(self) -> None:
        self._curves = [Curve() for _ in range(NUM_GUESSERS * _NUM_DEPTH_CLASSES * NUM_EVIDENCE_CLASSES)]
        self._unnamed = [Curve() for _ in self._curves]
        self._weights: dict[int, list[float]] = {}

    def judge(self, stated: Mapping[Guesser, Stated], depth: int, bias: RequestBias) -> JudgedPlace:
        """The chance that each candidate at level `depth` is accepted, given that its parent is."""
        guessers = tuple(stated)
        indexes = [_curve_index(guesser, depth, said.evidence) for guesser, said in stated.items()]
        curves = tuple(self._curves[index] for index in indexes)
        unnamed_curves = tuple(self._unnamed[index] for index in indexes)
        unnamed = [curve(_UNNAMED) for curve in unnamed_curves]
        sides = [
            (said.probabilities, curve, bias.values[guesser], unnamed_log_odds, 3**guesser)
            for (guesser, said), curve, unnamed_log_odds in zip(stated.items(), curves, unnamed, strict=True)
        ]
        candidates = []
        for token_id in dict.fromkeys(token_id for said in stated.values() for token_id in said.probabilities):
            case = 0
            inputs: list[float] = []
            log_odds: list[float | None] = []
            for probabilities, curve, own_bias, unnamed_log_odds, digit in sides:
                probability = probabilities.get(token_id)
                if probability is None:
                    case += 2 * digit
                    log_odds.append(None)
                    inputs.append(unnamed_log_odds)
                else:
                    case += digit
                    said_log_odds = _log_odds(probability)
                    log_odds.append(said_log_odds)
                    inputs.append(curve(said_log_odds) + own_bias)
            mixed = self._mixed(case, guessers, inputs)
            candidates.append(Candidate(token_id, _sigmoid(mixed), tuple(inputs), tuple(log_odds), case))
        return JudgedPlace(guessers, curves, unnamed_curves, tuple(candidates))

    def observe(self, place: JudgedPlace, chosen_token_id: int, bias: RequestBias) -> None:
        """Learn from what was chosen at a place that the verdict reached."""
        for candidate in place.candidates:
            is_accepted = candidate.token_id == chosen_token_id
            error = is_accepted - candidate.probability
            weights = self._weights_of(candidate.case)
            for index, guesser in enumerate(place.guessers):
                stated = candidate.stated[index]
                weight = weights[guesser]
                if stated is None:
                    place.unnamed_curves[index].observe(_UNNAMED, is_accepted)
                else:
                    place.curves[index].observe(stated, is_accepted)
                    moved = bias.values[guesser] + _BIAS_RATE * error * weight
                    bias.values[guesser] = max(-_MAX_BIAS, min(_MAX_BIAS, moved))
                weights[guesser] = max(-0.5, min(2.0, weight + _MIXER_RATE * error * candidate.inputs[index]))
            weights[-1] = max(-3.0, min(3.0, weights[-1] + _MIXER_RATE * error))

    def _mixed(self, case: int, guessers: Sequence[Guesser], inputs: Sequence[float]) -> float:
        weights = self._weights_of(case)
        total = weights[-1]
        for guesser, value in zip(guessers, inputs, strict=True):
            total += weights[guesser] * value
        return max(-_MAX_LOG_ODDS, min(_MAX_LOG_ODDS, total))

    def _weights_of(self, case: int) -> list[float]:
        weights = self._weights.get(case)
        if weights is None:
            digits = [case // 3**guesser % 3 for guesser in range(NUM_GUESSERS)]
            num_named = digits.count(1)
            # Opinions of guessers that looked at the same text agree for the same reasons: less than a sum.
            named, unnamed = num_named**-0.6 if num_named else 0.0, 0.5
            weights = self._weights[case] = [(0.0, named, unnamed)[digit] for digit in digits] + [0.0]
        return weights


def _curve_index(guesser: Guesser, depth: int, evidence: int) -> int:
    depth_class = _DEPTH_CLASS[depth] if depth < len(_DEPTH_CLASS) else _NUM_DEPTH_CLASSES - 1
    return (guesser * _NUM_DEPTH_CLASSES + depth_class) * NUM_EVIDENCE_CLASSES + evidence


def _log_odds(probability: float) -> float:
    probability = max(1e-4, min(1.0 - 1e-4, probability))
    return math.log(probability / (1.0 - probability))


def _sigmoid(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))
