"""How likely a guess is accepted, of any source: learned online from verdicts, so that all guessers compare.

Every guesser states a probability of its own and how much evidence it has. A curve per guesser, depth and evidence
turns that into the observed frequency of acceptance; then a mixer weighs the guessers that looked at the same place
(logistic mixing: log-odds are added with learned weights, as data compressors do). What is learned is numbers about
guessers, never about tokens: one process keeps one estimate for all requests and no text can leak through it. What is
peculiar to a request is a bias per guesser, kept with the request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from drafter_service.guesser import NUM_EVIDENCE_CLASSES, Guesser, Stated

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
# A guesser that looked and did not name a token: its curve is read at one place, log-odds of -4.
_UNNAMED = (-4.0 - _FIRST_KNOT) / _KNOT_DISTANCE


class Curve:
    """Stated log-odds -> log-odds of the observed frequency, linear between knots; starts as the identity.

    A place is a distance from the first knot, in knots.
    """

    __slots__ = ("_accepted", "_log_odds", "_tried")

    def __init__(self) -> None:
        self._log_odds = [_FIRST_KNOT + _KNOT_DISTANCE * knot for knot in range(_NUM_KNOTS)]
        self._accepted = [_KNOT_STRENGTH * _probability(log_odds) for log_odds in self._log_odds]
        self._tried = [_KNOT_STRENGTH] * _NUM_KNOTS

    def __call__(self, place: float) -> float:
        """The log-odds of being right."""
        knot = int(place)
        low = self._log_odds[knot]
        return low + (place - knot) * (self._log_odds[knot + 1] - low)

    def read(self, probabilities: Mapping[int, float], bias: float) -> tuple[dict[int, float], dict[int, float]]:
        """Places of many, and their log-odds, `bias` added. Written out: this is the inner loop of fusing."""
        log_odds, log = self._log_odds, math.log
        places: dict[int, float] = {}
        read: dict[int, float] = {}
        for token_id, probability in probabilities.items():
            if probability > _MAX_STATED:
                probability = _MAX_STATED
            elif probability < _MIN_STATED:
                probability = _MIN_STATED
            place = places[token_id] = (log(probability / (1.0 - probability)) - _FIRST_KNOT) / _KNOT_DISTANCE
            knot = int(place)
            low = log_odds[knot]
            read[token_id] = low + (place - knot) * (log_odds[knot + 1] - low) + bias
        return places, read

    def observe(self, place: float, num_accepted: int, num_tried: int = 1) -> None:
        """Count the verdict on tokens at a place."""
        knot = int(place)
        for index, weight in ((knot, 1.0 - place + knot), (knot + 1, place - knot)):
            self._tried[index] += weight * num_tried
            self._accepted[index] += weight * num_accepted
            if self._tried[index] > _MAX_KNOT_WEIGHT:  # what is long ago fades
                self._tried[index] /= 2.0
                self._accepted[index] /= 2.0
            frequency = max(1e-4, min(1.0 - 1e-4, self._accepted[index] / self._tried[index]))
            self._log_odds[index] = math.log(frequency / (1.0 - frequency))


@dataclass(frozen=True, slots=True)
class _Opinion:
    """One guesser at a place: of the tokens that it named, where its `curve` was read, and the log-odds found there;
    and the curve for others."""

    guesser: Guesser
    curve: Curve
    unnamed_curve: Curve
    places: Mapping[int, float]
    log_odds: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class JudgedPlace:
    """All that was said after one path: enough to learn from the verdict. `probabilities` are the estimates by token,
    `cases` say which guessers named the token."""

    opinions: Sequence[_Opinion]
    cases: Mapping[int, int]
    probabilities: Mapping[int, float]


class AcceptanceEstimate:
    """Shared by the requests of one model; of fixed size once every case has come up."""

    def __init__(self) -> None:
        num_curves = len(Guesser) * _NUM_DEPTH_CLASSES * NUM_EVIDENCE_CLASSES
        self.curves = [(Curve(), Curve()) for _ in range(num_curves)]  # for tokens named, and not
        self._weights: dict[int, list[float]] = {}

    def weights_of(self, case: int) -> list[float]:
        """The mixer's: one per guesser, then a constant."""
        weights = self._weights.get(case)
        if weights is None:
            digits = [case // digit % 3 for digit in _DIGITS]
            # Opinions of guessers that looked at the same text agree for the same reasons: less than a sum.
            named, unnamed = max(1, digits.count(1)) ** -0.6, 0.5
            weights = self._weights[case] = [(0.0, named, unnamed)[digit] for digit in digits] + [0.0]
        return weights


class Judge:
    """The estimate for one request. `biases` say how much better or worse each guesser does here, in log-odds."""

    def __init__(self, estimate: AcceptanceEstimate) -> None:
        self._estimate = estimate
        self.biases = [0.0] * len(Guesser)

    def judge(self, stated: Mapping[Guesser, Stated], depth: int) -> JudgedPlace:
        """The chance that each named token at level `depth` is accepted, given that its parent is."""
        depth_class = _DEPTH_CLASS[min(depth, len(_DEPTH_CLASS) - 1)]
        silent = 2 * sum(_DIGITS[guesser] for guesser in stated)
        opinions: list[_Opinion] = []
        cases: dict[int, int] = {}
        for guesser, said in stated.items():
            of_depth = (guesser * _NUM_DEPTH_CLASSES + depth_class) * NUM_EVIDENCE_CLASSES
            curve, unnamed_curve = self._estimate.curves[of_depth + said.evidence]
            places, log_odds = curve.read(said.probabilities, self.biases[guesser])
            opinions.append(_Opinion(guesser, curve, unnamed_curve, places, log_odds))
            for token_id in places:
                cases[token_id] = cases.get(token_id, silent) - _DIGITS[guesser]
        # What is the same for all tokens of a case, and per guesser that named them weight and log-odds.
        terms_of: dict[int, tuple[float, list[tuple[float, Mapping[int, float]]]]] = {}
        for case in {*cases.values()}:
            weights = self._estimate.weights_of(case)
            constant, terms = weights[-1], []
            for opinion in opinions:
                if case // _DIGITS[opinion.guesser] % 3 == 1:
                    terms.append((weights[opinion.guesser], opinion.log_odds))
                else:
                    constant += weights[opinion.guesser] * opinion.unnamed_curve(_UNNAMED)
            terms_of[case] = constant, terms
        probabilities: dict[int, float] = {}
        for token_id, case in cases.items():
            total, terms = terms_of[case]
            for weight, log_odds_of in terms:
                total += weight * log_odds_of[token_id]
            probabilities[token_id] = _probability(max(-_MAX_LOG_ODDS, min(_MAX_LOG_ODDS, total)))
        return JudgedPlace(opinions, cases, probabilities)

    def observe(self, place: JudgedPlace, chosen_token_id: int) -> None:
        """Learn from what was chosen at a place that the verdict reached."""
        unnamed = [opinion.unnamed_curve(_UNNAMED) for opinion in place.opinions]
        for token_id, case in place.cases.items():
            error = (token_id == chosen_token_id) - place.probabilities[token_id]
            weights = self._estimate.weights_of(case)
            for opinion, value in zip(place.opinions, unnamed, strict=True):
                guesser = opinion.guesser
                if token_id in opinion.log_odds:
                    value = opinion.log_odds[token_id]
                    moved = self.biases[guesser] + _BIAS_RATE * error * weights[guesser]
                    self.biases[guesser] = max(-_MAX_BIAS, min(_MAX_BIAS, moved))
                weights[guesser] = max(-0.5, min(2.0, weights[guesser] + _MIXER_RATE * error * value))
            weights[-1] = max(-3.0, min(3.0, weights[-1] + _MIXER_RATE * error))
        for opinion in place.opinions:
            for token_id, where in opinion.places.items():
                opinion.curve.observe(where, token_id == chosen_token_id)
            if num_unnamed := len(place.cases) - len(opinion.places):
                is_missed = chosen_token_id in place.cases and chosen_token_id not in opinion.places
                opinion.unnamed_curve.observe(_UNNAMED, is_missed, num_unnamed)


def _probability(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))
