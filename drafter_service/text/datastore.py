"""Retrieval from a corpus: what followed the longest suffix of the text there, as a trie with counts (RASD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drafter_service.text.prediction import Prediction, best
from easyspec.datastore.suffix_index import Match, SuffixIndex

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


@dataclass(frozen=True, slots=True)
class TrieNode:
    """A place in the trie of continuations, which is made when it is looked at.

    `numbers` are the continuations that went this way, `depth` how far.
    """

    trie: Trie
    depth: int
    numbers: Sequence[int]

    def weights(self) -> dict[int, float]:
        """Where they go on from here, and how much weight goes there."""
        continuations, depth = self.trie.continuations, self.depth
        weights: dict[int, float] = {}
        for number in self.numbers:
            token_ids, weight = continuations[number]
            if depth < len(token_ids):
                token_id = token_ids[depth]
                weights[token_id] = weights.get(token_id, 0.0) + weight
        return weights

    def child(self, token_id: int) -> TrieNode | None:
        """One token further; None if no continuation goes there."""
        continuations, depth = self.trie.continuations, self.depth
        numbers = [
            number
            for number in self.numbers
            if depth < len(continuations[number][0]) and continuations[number][0][depth] == token_id
        ]
        return TrieNode(self.trie, depth + 1, numbers) if numbers else None


@dataclass(frozen=True)
class Trie:
    """Continuations with their weights, to be counted by prefix."""

    continuations: Sequence[tuple[Sequence[int], float]]

    @property
    def root(self) -> TrieNode:
        """Where all of them begin."""
        return TrieNode(self, 0, range(len(self.continuations)))


@dataclass(frozen=True)
class Found:
    """What a lookup found: the trie of continuations and how strong the match was."""

    root: TrieNode
    evidence: int


class Datastore:
    """A suffix index, asked once a round."""

    def __init__(self, index: SuffixIndex) -> None:
        self._index = index

    def look_up(self, token_ids: Sequence[int]) -> Found | None:
        """Continuations of the longest suffixes of the text that the corpus has."""
        context = list(token_ids[-_MAX_LENGTH:])
        matches = self._index.longest_matches(context, _MIN_LENGTH, _MAX_LENGTH)
        if not matches:
            return None
        length = max(match.length for match in matches)
        continuations: list[tuple[Sequence[int], float]] = []
        for match in matches:
            if match.length == length:
                continuations += self._collected(match, context)
        if not any(token_ids for token_ids, _ in continuations):
            return None
        return Found(Trie(continuations).root, sum(length >= bound for bound in _EVIDENCE_LENGTHS))

    def _collected(self, match: Match, context: list[int]) -> list[tuple[Sequence[int], float]]:
        shorter = match.length // 2
        found: list[tuple[Sequence[int], float]] = []
        if match.num_places < _ENOUGH_PLACES and shorter >= _MIN_LENGTH:
            wider = self._index.shorten(context, match, shorter)
            found += [(each, 1.0) for each in self._index.continuations(wider, _MAX_PLACES, _NUM_TOKENS)]
        found += [(each, _LONGEST_WEIGHT) for each in self._index.continuations(match, _MAX_PLACES, _NUM_TOKENS)]
        return found


def predict_in_trie(node: TrieNode, evidence: int) -> Prediction | None:
    """How the continuations went on from here."""
    weights = node.weights()
    if not weights:
        return None
    total = sum(weights.values()) + _UNSEEN
    return best({token_id: weight / total for token_id, weight in weights.items()}, evidence)
