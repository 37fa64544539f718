"""Whether a round is worth the draft model's time, where text has something to say too.

Copied text is drafted as well by text alone, in a fraction of the time. What text expects of its own tree is an
estimate learned from verdicts; by classes of that number this learns how many tokens rounds came to with the model and
without, and from the clock how long either takes with the verifier's part. The better rate of tokens a second wins.
Numbers about rounds only, so that one process keeps them for all requests.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

# Expected tokens of a round of text, from which the classes begin.
_CLASS_BOUNDS = (1.5, 2.5, 4.0, 6.0, 9.0)
_RATE = 0.1
# Rounds of a class that ask the model before anything is believed about the class.
_MIN_ROUNDS = 3
# A side that lost narrowly is tried again after so many rounds of a class, one that is slower by a factor after the
# factor's square as many: what was learned once does not stay for ever, and hopeless trials are few.
_RETRIAL_ROUNDS = 24
# A longer silence of the other side is not the verifier's work.
_MAX_GAP_RATIO = 4.0


class Average:
    """What a number is of late; the first few count alike."""

    def __init__(self, rate: float = _RATE) -> None:
        self.value = 0.0
        self.count = 0
        self._rate = rate

    def add(self, number: float) -> None:
        self.count += 1
        self.value += (number - self.value) * max(self._rate, 1.0 / self.count)


@dataclass
class _Side:
    """Rounds of a class, with the model or without."""

    tokens: Average
    num_since: int = 0


class ModelUse:
    """Decides, and learns from what came of it. Times in seconds."""

    def __init__(self) -> None:
        classes = range(len(_CLASS_BOUNDS) + 1)
        self._sides = [{True: _Side(Average()), False: _Side(Average())} for _ in classes]
        self._draft_s = {True: Average(), False: Average()}
        self._rest_s = Average()

    def is_worth_it(self, expected_of_text: float) -> bool:
        """Whether to ask the model in a round of which text alone expects so many tokens, the bonus among them."""
        sides = self._sides[_class_of(expected_of_text)]
        if sides[True].tokens.count < _MIN_ROUNDS or not self._rest_s.count:
            return True
        with_model = sides[True].tokens.value / (self._rest_s.value + self._draft_s[True].value)
        of_text = sides[False].tokens.value if sides[False].tokens.count else expected_of_text
        without = of_text / (self._rest_s.value + self._draft_s[False].value)
        better = with_model >= without
        factor = max(with_model, without) / max(min(with_model, without), 1e-9)
        is_retrial = sides[not better].num_since > _RETRIAL_ROUNDS * factor**2
        return better is not is_retrial

    def drafted(self, duration_s: float, *, has_model: bool) -> None:
        """A tree was drafted in so much time."""
        self._draft_s[has_model].add(duration_s)

    def returned(self, gap_s: float) -> None:
        """The verdict came so long after the tree was sent off."""
        most = self._rest_s.value * _MAX_GAP_RATIO if self._rest_s.count else gap_s
        self._rest_s.add(min(gap_s, most))

    def observe(self, expected_of_text: float, num_tokens: int, *, has_model: bool) -> None:
        """A round that text expected so much of came to `num_tokens`."""
        sides = self._sides[_class_of(expected_of_text)]
        sides[has_model].tokens.add(num_tokens)
        sides[has_model].num_since = 0
        sides[not has_model].num_since += 1


def _class_of(expected: float) -> int:
    return bisect.bisect_right(_CLASS_BOUNDS, expected)
