"""Whether text is worth its work in the rounds of a request that the draft model drafts too.

Looking up and fusing is work of the processor, in every round; sampled text hardly repeats itself, and pays for nothing
there. What text brings is known afterwards, without a trial: the verdict says how far the tree got, and how far the
model's own tree, cut to as many nodes, would have got. Where the gain is a smaller part of a round's tokens than the
work is of its time, text rests for some rounds, longer each time, and then looks again.
"""

from __future__ import annotations

from collections.abc import Sequence

from drafter_service.fusion.model_use import Average
from easyspec.speculation.token_tree import TokenTree

# What many requests have in common is learned slowly: a round's gain scatters by more than it is worth.
_SHARED_RATE = 0.01
# Rounds, of whichever request, before anything is believed.
_MIN_SHARED_ROUNDS = 64
# What is known of other requests counts as so many rounds of this one, whose own count less as they get older.
_PRIOR_ROUNDS = 12
_KEPT = 0.96
# Rounds that look before another decision, and how long a rest is at first and at most.
_LOOKS = 4
_FIRST_REST, _MOST_REST = 16, 256
# One round that waits for a slow client says nothing about what rounds take.
_MAX_ROUND_RATIO = 4.0


class TextGains:
    """What is known of text over all requests of a kind (greedy, or sampled): numbers about rounds only."""

    def __init__(self) -> None:
        self.gain = Average(_SHARED_RATE)
        self.num_tokens = Average(_SHARED_RATE)
        self.work_s = Average()
        self.round_s = Average()

    def took(self, work_s: float, round_s: float) -> None:
        """A round took `round_s`, of which text had `work_s`."""
        self.work_s.add(work_s)
        most = _MAX_ROUND_RATIO * self.round_s.value if self.round_s.count else round_s
        self.round_s.add(min(round_s, most))


class TextUse:
    """Decides for one request, and learns from what came of it."""

    def __init__(self, shared: TextGains) -> None:
        self._shared = shared
        self._gain = 0.0
        self._weight = 0.0
        self._num_looks = _LOOKS  # others' rounds may speak against the first look
        self._rest_left = 0
        self._rest = _FIRST_REST

    def is_worth_it(self, num_sharing: int) -> bool:
        """Whether to ask text in the next round; `num_sharing` open requests share this thread."""
        if self._rest_left > 0:
            self._rest_left -= 1
            self._num_looks = 0
            return False
        if self._num_looks < _LOOKS or self._is_gain(num_sharing):
            self._num_looks += 1
            return True
        self._rest_left, self._rest = self._rest - 1, min(2 * self._rest, _MOST_REST)
        return False

    def _is_gain(self, num_sharing: int) -> bool:
        shared = self._shared
        if shared.gain.count < _MIN_SHARED_ROUNDS:
            return True
        gain = (_PRIOR_ROUNDS * shared.gain.value + self._gain) / (_PRIOR_ROUNDS + self._weight)
        without = max(1.0, shared.num_tokens.value - shared.gain.value)
        # While others wait, their work is part of this request's round as well.
        share_of_time = min(0.5, num_sharing * shared.work_s.value / max(shared.round_s.value, 1e-9))
        return gain / without > share_of_time / (1.0 - share_of_time)

    def observe(self, num_tokens: int, num_without: int) -> None:
        """A round came to `num_tokens`, and would have come to `num_without` without text."""
        gain = num_tokens - num_without
        self._gain = _KEPT * self._gain + gain
        self._weight = _KEPT * self._weight + 1.0
        self._shared.gain.add(gain)
        self._shared.num_tokens.add(num_tokens)
        if gain > 0:
            self._rest = _FIRST_REST


def tokens_by(tree: TokenTree, token_ids: Sequence[int]) -> int:
    """How many tokens a round with `tree` would have come to, where the text goes on with `token_ids`: those of a path
    and one more, at least that many if the path is all of them."""
    row = num_found = 0
    for token_id in token_ids:
        child = tree.children[row].get(token_id)
        if child is None:
            break
        row, num_found = child, num_found + 1
    return num_found + 1
