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

import bisect
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from drafter_service.model.exit_state import Look
from drafter_service.worth import GAIN_RATE, ByTarget, TokenTime
from easyspec.engine.average import Average, clock_average

# Confidence classes, by the probability of a level's best candidates.
_CLASS_BORDERS = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
# What the bundled draft gains from layer 6 to 9 in top-1 agreement (models/EVALUATION.json); it fades as verdicts come.
_PRIOR_GAIN, _PRIOR_WEIGHT = 0.03, 16
_MAX_WEIGHT = 750  # what is longer ago fades
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


class ExitGate:
    """Decides which levels go on, and learns what came of it."""

    def __init__(self) -> None:
        self._stage_s: dict[Stage, Average] = {}
        self._targets = ByTarget(_Target)

    def goes_on(self, stage: Stage, levels: Sequence[LevelView]) -> list[bool]:
        """Which of the levels that have come to an exit together go on to the next one."""
        if stage not in self._stage_s:
            return [True] * len(levels)  # nothing is known yet
        price_s = self._stage_s[stage].value
        targets = [self._targets.of(level.target) for level in levels]
        places = [(stage.exit_index, _confidence_class(level.confidence)) for level in levels]
        worth_s = [
            target.gains[place].value * level.reach * target.seconds_of(level.depth)
            for target, place, level in zip(targets, places, levels, strict=True)
        ]
        if sum(each for each in worth_s if each > price_s) < price_s * len(levels):  # stopped levels wait too
            worth_s = [0.0] * len(levels)
        return [
            each > price_s or target.is_to_explore(place)
            for target, place, each in zip(targets, places, worth_s, strict=True)
        ]

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        """What the way to the next exit took, its head and ranking included."""
        self._stage_s.setdefault(stage, clock_average()).add(seconds)

    def observe_choice(self, target: str, looks: Sequence[Look], token_id: int) -> None:
        """What was chosen at a row that the verdict came to, and what the exits had said there, one after the other."""
        for exit_index, (look, deeper) in enumerate(itertools.pairwise(looks)):
            helped = (token_id in deeper.token_ids) - (token_id in look.token_ids)
            self._targets.of(target).gains[exit_index, _confidence_class(look.confidence)].add(helped)

    def observe_round(self, target: str, seconds: float, num_tokens: int, num_right: int) -> None:
        """How long a whole round of a request took, verifier included, how many tokens came of it, and how many levels
        of the tree had the token that was chosen there, one after the other."""
        known = self._targets.of(target)
        known.token_time.observe(seconds, num_tokens)
        for depth in range(1, num_right + 1):
            known.following[depth].add(num_right - depth)


class _Target:
    """How well exits guess for one base model, and what its tokens are worth: by exit and class of confidence how much
    likelier the next exit has the right token, and by level how many tokens are accepted below a right one."""

    def __init__(self) -> None:
        self.gains: defaultdict[tuple[int, int], Average] = defaultdict(
            lambda: Average(1.0 / _MAX_WEIGHT, value=_PRIOR_GAIN, count=_PRIOR_WEIGHT)
        )
        self.following: defaultdict[int, Average] = defaultdict(lambda: Average(GAIN_RATE))
        self.token_time = TokenTime()
        self._num_stops: Counter[tuple[int, int]] = Counter()

    def seconds_of(self, depth: int) -> float:
        """What a right token at a level is worth, with tokens accepted below it; no end before any is known."""
        token_s = self.token_time.seconds
        return math.inf if token_s is None else (1.0 + self.following[depth].value) * token_s

    def is_to_explore(self, place: tuple[int, int]) -> bool:
        """Count a level that would stop; True for every so many of them."""
        self._num_stops[place] += 1
        return self._num_stops[place] % _EXPLORE_EVERY == 0


def _confidence_class(confidence: float) -> int:
    return bisect.bisect_right(_CLASS_BORDERS, confidence)
