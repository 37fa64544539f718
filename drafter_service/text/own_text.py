"""Retrieval from the request itself: what followed the longest suffix when it stood in the text before."""

from __future__ import annotations

from collections.abc import Sequence

from drafter_service.guesser import Stated
from drafter_service.text.prediction import best
from drafter_service.text.suffix_automaton import Place, SuffixAutomaton

# Shorter contexts have many followers and predict little; the n-gram table has them.
_MIN_LENGTH = 2
_MAX_CONTEXTS = 3
_MIN_ESCAPE = 0.02
# Context lengths from which the classes of evidence begin.
_EVIDENCE_LENGTHS = (4, 6, 10, 20)


class OwnText(SuffixAutomaton):
    """The text of one request. Bounded: beyond `max_tokens` the older half is forgotten."""

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self._recent: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens of the request."""
        self._recent.extend(token_ids)
        if len(self._recent) > self.max_tokens:
            token_ids = self._recent = self._recent[-(self.max_tokens // 2) :]
            self.clear()
        super().extend(token_ids)

    def predict(self, place: Place) -> Stated | None:
        """Followers of the suffix at `place`, and of shorter ones for what that leaves open (as PPM's method C)."""
        if place.length < _MIN_LENGTH:
            return None
        probabilities: dict[int, float] = {}
        escape = 1.0
        context: Place | None = place
        for _ in range(_MAX_CONTEXTS):
            if context is None or context.length < _MIN_LENGTH or escape < _MIN_ESCAPE:
                break
            followers = self.followers(context)
            latest = self.latest_follower(context)
            if latest is not None and latest in followers:
                followers[latest] += 1  # what came last is likelier to come again
            if total := sum(followers.values()) + len(followers):
                for token_id, count in followers.items():
                    probabilities[token_id] = probabilities.get(token_id, 0.0) + escape * count / total
                escape *= len(followers) / total
            context = self.shorter(context)
        return best(probabilities, sum(place.length >= length for length in _EVIDENCE_LENGTHS))
