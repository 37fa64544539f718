"""Retrieval from a corpus: what followed the longest suffix of the text there, as a trie with counts (RASD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from drafter_service.guesser import Stated
from drafter_service.text.prediction import best
from easyspec.datastore.suffix_index import SuffixIndex

_MIN_LENGTH = 2
_MAX_LENGTH = 16
_MAX_PLACES = 32
_NUM_TOKENS = 12
# Fewer places than this are too few to tell what is likely: those of half the context join them, with less weight.
_ENOUGH_PLACES = 4
_LONGEST_WEIGHT = 4.0
# Places whose continuation is not counted on: keeps a single one from looking certain.
_UNSEEN = 1.0
_EVIDENCE_LENGTHS = (4, 6, 9, 14)
# A place in the trie: how deep it is, and the numbers of the continuations that went this way.
Branch: TypeAlias = tuple[int, Sequence[int]]


@dataclass(frozen=True)
class Continuations:
    """What a lookup found: token ids with their weights, a trie that is counted where it is looked at."""

    weighted: Sequence[tuple[Sequence[int], float]]
    evidence: int

    def end(self) -> Branch:
        """Where all of them begin."""
        return 0, range(len(self.weighted))

    def step(self, branch: Branch, token_id: int) -> Branch | None:
        """One token further; None if no continuation goes there."""
        weighted, (depth, numbers) = self.weighted, branch
        going = [
            number for number in numbers if depth < len(weighted[number][0]) and weighted[number][0][depth] == token_id
        ]
        return (depth + 1, going) if going else None

    def predict(self, branch: Branch) -> Stated | None:
        """How they go on from a place."""
        depth, numbers = branch
        weights: dict[int, float] = {}
        for number in numbers:
            token_ids, weight = self.weighted[number]
            if depth < len(token_ids):
                weights[token_ids[depth]] = weights.get(token_ids[depth], 0.0) + weight
        total = sum(weights.values()) + _UNSEEN
        return best({token_id: weight / total for token_id, weight in weights.items()}, self.evidence)


class Datastore:
    """A suffix index, asked once a round."""

    def __init__(self, index: SuffixIndex) -> None:
        self._index = index

    def look_up(self, token_ids: Sequence[int]) -> Continuations | None:
        """Continuations of the longest suffixes of the text that the corpus has."""
        context = list(token_ids[-_MAX_LENGTH:])
        matches = self._index.longest_matches(context, _MIN_LENGTH, _MAX_LENGTH)
        if not matches:
            return None
        length = max(match.length for match in matches)
        shorter = length // 2
        found: list[tuple[Sequence[int], float]] = []
        for match in matches:
            if match.length < length:
                continue
            if match.num_places < _ENOUGH_PLACES and shorter >= _MIN_LENGTH:
                wider = self._index.shorten(context, match, shorter)
                found += [(each, 1.0) for each in self._index.continuations(wider, _MAX_PLACES, _NUM_TOKENS)]
            found += [(each, _LONGEST_WEIGHT) for each in self._index.continuations(match, _MAX_PLACES, _NUM_TOKENS)]
        if not any(token_ids for token_ids, _ in found):
            return None
        return Continuations(found, sum(length >= bound for bound in _EVIDENCE_LENGTHS))
