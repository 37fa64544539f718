"""Retrieval from the request itself: what followed the longest suffix when it stood in the text before.

Every substring of the growing text is known, with how often it occurs and what follows: Blumer's suffix automaton,
online. A state stands for the substrings that end at the same places. Its suffix link leads to the longest shorter
suffix that also ends elsewhere, so walking links shortens the context to where more is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from drafter_service.guesser import Stated
from drafter_service.text.prediction import best

# Shorter contexts have many followers and predict little; the n-gram table has them.
_MIN_LENGTH = 2
_MAX_CONTEXTS = 3
_MIN_ESCAPE = 0.02
# Context lengths from which the classes of evidence begin.
_EVIDENCE_LENGTHS = (4, 6, 10, 20)
# Counts are brought up to date on this many states of the suffix path: those with the longest contexts, the ones that
# predict. In a text that repeats one token the path is as long as the text.
_MAX_UPDATED_STATES = 32
ROOT = 0


@dataclass(frozen=True)
class Place:
    """Where a text stands: the state of its longest known suffix, and that suffix's length in tokens."""

    state: int
    length: int


class SuffixAutomaton:
    """About two states a token, amortised constant time per token."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the text."""
        self._next: list[dict[int, int]] = [{}]
        self._link: list[int | None] = [None]
        self._length = [0]
        self._count = [0]
        self._latest: list[int | None] = [None]
        self._last = ROOT

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token_id in token_ids:
            self._append(token_id)

    def end(self) -> Place:
        """The longest suffix of the text that occurs in it before."""
        link = self._link[self._last]
        return Place(ROOT, 0) if link is None else Place(link, self._length[link])

    def step(self, place: Place, token_id: int) -> Place:
        """The longest suffix of (what stands at `place`, then the token) that occurs in the text."""
        state: int | None = place.state
        length = place.length
        while state is not None:
            target = self._next[state].get(token_id)
            if target is not None:
                return Place(target, length + 1)
            state = self._link[state]
            length = self._length[state] if state is not None else 0
        return Place(ROOT, 0)

    def shorter(self, place: Place) -> Place | None:
        """The next shorter suffix that occurs at more places; None at the empty one."""
        link = self._link[place.state]
        return None if link is None else Place(link, self._length[link])

    def followers(self, place: Place) -> dict[int, int]:
        """What followed the suffix at its occurrences, token -> how often."""
        count = self._count
        return {token_id: count[target] for token_id, target in self._next[place.state].items()}

    def latest_follower(self, place: Place) -> int | None:
        """What followed at the latest occurrence that was followed."""
        return self._latest[place.state]

    def _append(self, token_id: int) -> None:
        current = self._new_state(self._length[self._last] + 1, {}, count=0)
        for suffix in self._suffix_path(self._last):
            self._latest[suffix] = token_id
        state: int | None = self._last
        while state is not None and token_id not in self._next[state]:
            self._next[state][token_id] = current
            state = self._link[state]
        if state is None:
            self._link[current] = ROOT
        else:
            target = self._next[state][token_id]
            if self._length[state] + 1 != self._length[target]:
                target = self._split(state, target, token_id)
            self._link[current] = target
        self._last = current
        for suffix in self._suffix_path(current):
            self._count[suffix] += 1

    def _split(self, state: int | None, target: int, token_id: int) -> int:
        """A state for the shorter substrings of `target`, which from now on end at one place more than the longer."""
        assert state is not None, "a transition has a source"
        clone = self._new_state(self._length[state] + 1, dict(self._next[target]), self._count[target])
        self._latest[clone] = self._latest[target]
        self._link[clone] = self._link[target]
        self._link[target] = clone
        above: int | None = state
        while above is not None and self._next[above].get(token_id) == target:
            self._next[above][token_id] = clone
            above = self._link[above]
        return clone

    def _new_state(self, length: int, transitions: dict[int, int], count: int) -> int:
        self._next.append(transitions)
        self._link.append(None)
        self._length.append(length)
        self._count.append(count)
        self._latest.append(None)
        return len(self._next) - 1

    def _suffix_path(self, state: int | None) -> Iterator[int]:
        """A state and those of shorter suffixes, the longest first."""
        for _ in range(_MAX_UPDATED_STATES):
            if state is None:
                return
            yield state
            state = self._link[state]


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
