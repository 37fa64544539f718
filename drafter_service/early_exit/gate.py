"""When a level of the draft tree may leave the model early: learned online from verdicts and from the clock.

At an exit (a number of layers after which the head may be applied) a level has candidates, and a confidence. Going on
to the next exit takes time and may put the right token among the candidates that count. The gate compares, in seconds:
the chance that going on helps *at such a confidence*, as often as the verdict comes to this level at all, times what a
token is worth (the time one takes at present, and the tokens below it in the tree), against the time that all levels
of the batch wait. No threshold is set by hand (S2D, arXiv 2407.01955, has one a layer).

How much going on helps is known of levels that went on, where both opinions are there to compare; so every few times a
level goes on although it does not seem to pay. What is learned is numbers, never tokens, and of bounded size, apart for
each base model: one process keeps one gate for all requests.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from drafter_service.model.exit_state import Look
from drafter_service.worth import GAIN_RATE, Average, ByTarget, TokenTime, clock_average

# Confidence classes, by the probability of a level's best candidates.
_CLASS_BORDERS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
# What the bundled draft gains from layer 6 to 9 in top-1 agreement (models/EVALUATION.json); it fades as verdicts come.
_PRIOR_GAIN, _PRIOR_WEIGHT = 0.03, 16.0
_MAX_WEIGHT = 1000.0
_EXPLORE_EVERY = 16


@dataclass(frozen=True)
class LevelView:
    """A level at an exit. `reach` is the chance that the verdict comes to it; the first level's `depth` is 1.

    `target` tells the base models apart.
    """

    confidence: float
    reach: float
    depth: int
    target: str = ""


@dataclass(frozen=True)
class Stage:
    """The way from one exit to the next: for a first level, a later one, or one whose committed text comes along."""

    exit_index: int
    is_first: bool
    catches_up: bool


class ExitGate(Protocol):
    """Decides which levels go on, and learns what came of it."""

    def goes_on(self, stage: Stage, levels: Sequence[LevelView]) -> list[bool]:
        """Which of the levels that have come to an exit together go on to the next one."""

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        """What the way to the next exit took, its head and ranking included."""

    def observe_choice(self, target: str, looks: Sequence[Look], token_id: int) -> None:
        """What was chosen at a row that the verdict came to, and what the exits had said there, one after the other."""

    def observe_round(self, target: str, seconds: float, num_tokens: int, num_right: int) -> None:
        """How long a whole round of a request took, verifier included, how many tokens came of it, and how many levels
        of the tree had the token that was chosen there, one after the other."""


class LearnedGate:
    """The gate described above."""

    def __init__(self) -> None:
        self._stage_s: dict[Stage, Average] = {}
        self._targets = ByTarget(_Target)

    def goes_on(self, stage: Stage, levels: Sequence[LevelView]) -> list[bool]:
        price = self._stage_s.get(stage)
        if price is None:
            return [True] * len(levels)  # nothing is known yet
        gains = [self._targets.of(level.target).gain(stage.exit_index, level.confidence) for level in levels]
        worth = [
            gain.value * level.reach * self._targets.of(level.target).seconds_of(level.depth)
            for gain, level in zip(gains, levels, strict=True)
        ]
        wanted = [value > price.value for value in worth]
        total = sum(value for value, is_wanted in zip(worth, wanted, strict=True) if is_wanted)
        if total < price.value * len(levels):  # all levels wait for the levels that go on
            wanted = [False] * len(levels)
        return [is_wanted or gain.is_to_explore() for is_wanted, gain in zip(wanted, gains, strict=True)]

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        self._stage_s.setdefault(stage, clock_average()).add(seconds)

    def observe_choice(self, target: str, looks: Sequence[Look], token_id: int) -> None:
        for exit_index, (look, deeper) in enumerate(itertools.pairwise(looks)):
            helped = (token_id in deeper.token_ids) - (token_id in look.token_ids)
            self._targets.of(target).gain(exit_index, look.confidence).observe(helped)

    def observe_round(self, target: str, seconds: float, num_tokens: int, num_right: int) -> None:
        self._targets.of(target).observe_round(seconds, num_tokens, num_right)


class _Target:
    """How well exits guess for one base model, and what its tokens are worth."""

    def __init__(self) -> None:
        self._gains: dict[tuple[int, int], _Gain] = {}
        self._token_time = TokenTime()
        self._following: list[Average] = []

    def gain(self, exit_index: int, confidence: float) -> _Gain:
        """Of going on from an exit at such a confidence."""
        confidence_class = sum(confidence >= border for border in _CLASS_BORDERS)
        return self._gains.setdefault((exit_index, confidence_class), _Gain())

    def seconds_of(self, depth: int) -> float:
        """What a right token at a level is worth, with tokens accepted below it; no end before any is known."""
        following = self._following[depth - 1].value if depth <= len(self._following) else 0.0
        token_s = self._token_time.seconds
        return math.inf if token_s is None else (1.0 + following) * token_s

    def observe_round(self, seconds: float, num_tokens: int, num_right: int) -> None:
        self._token_time.observe(seconds, num_tokens)
        while len(self._following) < num_right:
            self._following.append(Average(GAIN_RATE))
        for depth in range(1, num_right + 1):
            self._following[depth - 1].add(num_right - depth)


class _Gain:
    """How much likelier the next exit has the right token, at one exit and class of confidence."""

    def __init__(self) -> None:
        self._sum = _PRIOR_GAIN * _PRIOR_WEIGHT
        self._weight = _PRIOR_WEIGHT
        self._num_stops = 0

    @property
    def value(self) -> float:
        return self._sum / self._weight

    def observe(self, helped: int) -> None:
        """1: the next exit had it and this one had not; -1: the other way round."""
        self._sum += helped
        self._weight += 1.0
        if self._weight > _MAX_WEIGHT:  # what is long ago fades
            self._sum /= 2.0
            self._weight /= 2.0

    def is_to_explore(self) -> bool:
        """Count a level that would stop; True for every so many of them."""
        self._num_stops += 1
        return self._num_stops % _EXPLORE_EVERY == 0
