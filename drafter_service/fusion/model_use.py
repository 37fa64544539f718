"""Whether a round is worth the draft model's time, where text has something to say too.

Copied text is drafted as well by text alone, in a fraction of the time. What text expects of its own tree is an
estimate learned from verdicts; by classes of that number this learns how many tokens rounds of text come to, how many
more those with the model, and from the clock how long either takes with the verifier's part. The better rate of tokens
a second wins. What text alone would have come to needs no trial: its tree is there before the model is asked, and the
verdict says how far it would have got. What the model would have come to is not known of rounds that it sat out.
"""

from __future__ import annotations

import bisect

# Expected tokens of a round of text, from which the classes begin.
_CLASS_BOUNDS = (1.5, 2.5, 4.0, 6.0, 9.0)
_RATE = 0.1
# Many requests' gains are learned slowly: those of single rounds scatter.
_SHARED_RATE = 0.03
# Rounds of a class that ask the model before anything is believed about the class.
_MIN_ROUNDS = 3
# A model that lost narrowly is tried again after so many rounds, one whose rate is lower by a factor after the
# factor's square as many: what was learned once does not stay for ever, and hopeless trials are few.
_RETRIAL_ROUNDS = 24
# What is known of other requests counts as so many rounds of this one, whose own count less as they get older.
_PRIOR_ROUNDS = 4
_KEPT = 0.9
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


class _Class:
    """Rounds of which text expected about as much."""

    def __init__(self) -> None:
        self.of_text = Average(_SHARED_RATE)
        self.gain = Average(_SHARED_RATE)
        self.num_since = 0  # rounds since the model was last asked


class ModelGains:
    """What is known of the model over all requests of a kind (greedy, or sampled): numbers about rounds only."""

    def __init__(self) -> None:
        self._classes = [_Class() for _ in range(len(_CLASS_BOUNDS) + 1)]
        self.draft_s = {True: Average(), False: Average()}  # with the model, and without
        self.rest_s = Average()

    def of(self, expected_of_text: float) -> _Class:
        """The class of a round of which text expects so many tokens."""
        return self._classes[bisect.bisect_right(_CLASS_BOUNDS, expected_of_text)]


class ModelUse:
    """Decides for one request, and learns from what came of it. Times in seconds."""

    def __init__(self, shared: ModelGains) -> None:
        self._shared = shared
        self._excess = 0.0  # gains of this request's rounds, less those of other requests
        self._weight = 0.0
        self._num_since = 0

    def is_worth_it(self, expected_of_text: float) -> bool:
        """Whether to ask the model in a round of which text alone expects so many tokens, the bonus among them."""
        shared, known = self._shared, self._shared.of(expected_of_text)
        if known.gain.count < _MIN_ROUNDS or not shared.rest_s.count:
            return True
        gain = max(0.0, known.gain.value + self._excess / (_PRIOR_ROUNDS + self._weight))
        with_model = (known.of_text.value + gain) / (shared.rest_s.value + shared.draft_s[True].value)
        without = known.of_text.value / (shared.rest_s.value + shared.draft_s[False].value)
        if with_model >= without:
            return True
        return max(known.num_since, self._num_since) > _RETRIAL_ROUNDS * (without / with_model) ** 2

    def drafted(self, duration_s: float, *, has_model: bool) -> None:
        """A tree was drafted in so much time."""
        self._shared.draft_s[has_model].add(duration_s)

    def returned(self, gap_s: float) -> None:
        """The verdict came so long after the tree was sent off."""
        rest_s = self._shared.rest_s
        rest_s.add(min(gap_s, rest_s.value * _MAX_GAP_RATIO) if rest_s.count else gap_s)

    def observe(self, expected_of_text: float, num_of_text: int, num_tokens: int | None) -> None:
        """A round that text expected so much of came, or would have come, to `num_of_text` without the model, and to
        `num_tokens` with it; None if it sat out."""
        known = self._shared.of(expected_of_text)
        known.of_text.add(num_of_text)
        if num_tokens is None:
            known.num_since += 1
            self._num_since += 1
            return
        gain = num_tokens - num_of_text
        known.gain.add(gain)
        known.num_since = self._num_since = 0
        self._excess = _KEPT * self._excess + gain - known.gain.value
        self._weight = _KEPT * self._weight + 1.0
