"""How likely a guess is accepted, of any source: learned online from verdicts, so that all guessers compare.

Every guesser states a probability of its own and how much evidence it has. A curve per guesser, depth and evidence
turns that into the observed frequency of acceptance; then a mixer weighs the guessers that looked at the same place
(logistic mixing: log-odds are added with learned weights, as data compressors do). What is learned is numbers about
guessers, never about tokens: one process keeps one estimate for all requests and no text can leak through it. What is
peculiar to a request is a bias per guesser, kept with the request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from drafter_service.guesser import NUM_EVIDENCE_CLASSES, Guesser, Stated

NUM_GUESSERS = len(Guesser)
# A case has a digit of base three per guesser: it was not there (0), named the token (1), or named others (2).
_DIGITS = tuple(3**guesser for guesser in Guesser)

_FIRST_KNOT, _KNOT_DISTANCE, _NUM_KNOTS = -6.0, 1.5, 9  # log-odds
_KNOT_STRENGTH = 4.0
_MAX_KNOT_WEIGHT = 2000.0
_DEPTH_CLASS = (0, 0, 1, 1, 2)  # by depth; deeper is 2
_NUM_DEPTH_CLASSES = 3
_MIXER_RATE = 0.02
_BIAS_RATE = 0.05
_MAX_BIAS = 3.0
_MAX_LOG_ODDS = 7.0
# What is stated is read within the knots: log-odds of -5.99 and 5.99.
_MIN_STATED, _MAX_STATED = 0.0025, 0.9975
# A guesser that looked and did not name a token: its curve is read at one place.
_UNNAMED = -4.0


@dataclass(frozen=True, slots=True)
class JudgedPlace:
    """All that was said after one path, and what became of it: enough to learn from the verdict.

    `probabilities` are the estimates by token, `cases` say which named the token. `inputs` holds, per guesser of the
    place, the calibrated log-odds of the tokens that it named.
    """

    guessers: tuple[Guesser, ...]
    stated: tuple[Stated, ...]
    curves: tuple[Curve, ...]
    unnamed_curves: tuple[Curve, ...]
    inputs: tuple[Mapping[int, float], ...]
    cases: Mapping[int, int]
    probabilities: Mapping[int, float]


class Curve:
    """Stated log-odds -> log-odds of the observed frequency, linear between knots; starts as the identity."""

    __slots__ = ("_accepted", "_log_odds", "_tried")

    def __init__(self) -> None:
        self._log_odds = [_FIRST_KNOT + _KNOT_DISTANCE * knot for knot in range(_NUM_KNOTS)]
        self._accepted = [_KNOT_STRENGTH * _sigmoid(log_odds) for log_odds in self._log_odds]
        self._tried = [_KNOT_STRENGTH] * _NUM_KNOTS

    @property
    def num_observed(self) -> float:
        """Verdicts counted; faded ones count less."""
        return sum(self._tried) - _KNOT_STRENGTH * _NUM_KNOTS

    def __call__(self, stated: float) -> float:
        """The log-odds of being right; `stated` lies between the knots."""
        place = (stated - _FIRST_KNOT) / _KNOT_DISTANCE
        knot = int(place)
        low = self._log_odds[knot]
        return low + (place - knot) * (self._log_odds[knot + 1] - low)

    def read(self, probabilities: Mapping[int, float], bias: float) -> dict[int, float]:
        """The log-odds of many, `bias` added. Written out: this is the inner loop of fusing."""
        log_odds, log = self._log_odds, math.log
        found: dict[int, float] = {}
        for token_id, probability in probabilities.items():
            if probability > _MAX_STATED:
                probability = _MAX_STATED
            elif probability < _MIN_STATED:
                probability = _MIN_STATED
            place = (log(probability / (1.0 - probability)) - _FIRST_KNOT) / _KNOT_DISTANCE
            knot = int(place)
            low = log_odds[knot]
            found[token_id] = low + (place - knot) * (log_odds[knot + 1] - low) + bias
        return found

    def observe(self, probabilities: Mapping[int, float], chosen_token_id: int) -> None:
        """Count the verdict on all that was named at a place."""
        log, tried, accepted = math.log, self._tried, self._accepted
        touched: set[int] = set()
        for token_id, probability in probabilities.items():
            if probability > _MAX_STATED:
                probability = _MAX_STATED
            elif probability < _MIN_STATED:
                probability = _MIN_STATED
            place = (log(probability / (1.0 - probability)) - _FIRST_KNOT) / _KNOT_DISTANCE
            knot = int(place)
            upper = place - knot
            tried[knot] += 1.0 - upper
            tried[knot + 1] += upper
            if token_id == chosen_token_id:
                accepted[knot] += 1.0 - upper
                accepted[knot + 1] += upper
            touched.add(knot)
            touched.add(knot + 1)
        self._refresh(touched)

    def observe_unnamed(self, num_accepted: int, num_tried: int) -> None:
        """Count the verdict on tokens that others named."""
        place = (_UNNAMED - _FIRST_KNOT) / _KNOT_DISTANCE
        knot = int(place)
        for index, weight in ((knot, 1.0 - place + knot), (knot + 1, place - knot)):
            self._tried[index] += weight * num_tried
            self._accepted[index] += weight * num_accepted
        self._refresh((knot, knot + 1))

    def _refresh(self, knots: Iterable[int]) -> None:
        for knot in knots:
            if self._tried[knot] > _MAX_KNOT_WEIGHT:  # what is long ago fades
                self._tried[knot] /= 2.0
                self._accepted[knot] /= 2.0
            self._log_odds[knot] = _log_odds(self._accepted[knot] / self._tried[knot])


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
        """The chance that each named token at level `depth` is accepted, given that its parent is."""
        guessers = tuple(stated)
        indexes = [_curve_index(guesser, depth, said.evidence) for guesser, said in stated.items()]
        curves = tuple(self._curves[index] for index in indexes)
        unnamed_curves = tuple(self._unnamed[index] for index in indexes)
        silent = 2 * sum(_DIGITS[guesser] for guesser in guessers)
        inputs: list[dict[int, float]] = []
        cases: dict[int, int] = {}
        for (guesser, said), curve in zip(stated.items(), curves, strict=True):
            digit = _DIGITS[guesser]
            for token_id in said.probabilities:
                cases[token_id] = cases.get(token_id, silent) - digit
            inputs.append(curve.read(said.probabilities, bias.values[guesser]))
        probabilities: dict[int, float] = {}
        place = JudgedPlace(
            guessers, tuple(stated.values()), curves, unnamed_curves, tuple(inputs), cases, probabilities
        )
        self._mix(place, probabilities)
        return place

    def observe(self, place: JudgedPlace, chosen_token_id: int, bias: RequestBias) -> None:
        """Learn from what was chosen at a place that the verdict reached."""
        unnamed = [curve(_UNNAMED) for curve in place.unnamed_curves]
        for token_id, case in place.cases.items():
            error = (token_id == chosen_token_id) - place.probabilities[token_id]
            step = _MIXER_RATE * error
            weights = self._weights_of(case)
            for index, guesser in enumerate(place.guessers):
                weight, value = weights[guesser], place.inputs[index].get(token_id)
                if value is None:
                    value = unnamed[index]
                else:
                    moved = bias.values[guesser] + _BIAS_RATE * error * weight
                    bias.values[guesser] = max(-_MAX_BIAS, min(_MAX_BIAS, moved))
                weights[guesser] = max(-0.5, min(2.0, weight + step * value))
            weights[-1] = max(-3.0, min(3.0, weights[-1] + step))
        self._observe_curves(place, chosen_token_id)

    def _observe_curves(self, place: JudgedPlace, chosen_token_id: int) -> None:
        is_chosen_known = chosen_token_id in place.cases
        for said, curve, unnamed_curve in zip(place.stated, place.curves, place.unnamed_curves, strict=True):
            curve.observe(said.probabilities, chosen_token_id)
            num_unnamed = len(place.cases) - len(said.probabilities)
            if num_unnamed:
                is_missed = is_chosen_known and chosen_token_id not in said.probabilities
                unnamed_curve.observe_unnamed(is_missed, num_unnamed)

    def _mix(self, place: JudgedPlace, probabilities: dict[int, float]) -> None:
        """The estimate of every token: log-odds of guessers that named it and of the others, weighed by the case."""
        terms_of: dict[int, tuple[float, list[tuple[float, Mapping[int, float]]]]] = {}
        for token_id, case in place.cases.items():
            known = terms_of.get(case)
            if known is None:
                known = terms_of[case] = self._terms(place, case)
            total, terms = known
            for weight, inputs in terms:
                total += weight * inputs[token_id]
            if total > _MAX_LOG_ODDS:
                total = _MAX_LOG_ODDS
            elif total < -_MAX_LOG_ODDS:
                total = -_MAX_LOG_ODDS
            probabilities[token_id] = 1.0 / (1.0 + math.exp(-total))

    def _terms(self, place: JudgedPlace, case: int) -> tuple[float, list[tuple[float, Mapping[int, float]]]]:
        """What is the same for all tokens of a case, and per guesser that named them weight and inputs."""
        weights = self._weights_of(case)
        constant = weights[-1]
        terms = []
        for guesser, inputs, unnamed_curve in zip(place.guessers, place.inputs, place.unnamed_curves, strict=True):
            if case // _DIGITS[guesser] % 3 == 1:
                terms.append((weights[guesser], inputs))
            else:
                constant += weights[guesser] * unnamed_curve(_UNNAMED)
        return constant, terms

    def _weights_of(self, case: int) -> list[float]:
        weights = self._weights.get(case)
        if weights is None:
            digits = [case // _DIGITS[guesser] % 3 for guesser in range(NUM_GUESSERS)]
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
