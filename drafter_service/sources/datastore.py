"""Retrieval from a corpus: what followed the longest suffix of the text there, as a trie with counts (RASD)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from drafter_service.sources.prediction import Prediction, best
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


@dataclass
class TrieNode:
    """Continuations that went the same way: how many, and where they went on."""

    weight: float = 0.0
    children: dict[int, TrieNode] = field(default_factory=dict)

    def insert(self, token_ids: Sequence[int], weight: float) -> None:
        """Count one continuation."""
        node = self
        for token_id in token_ids:
            child = node.children.get(token_id)
            if child is None:
                child = node.children[token_id] = TrieNode()
            child.weight += weight
            node = child


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
        root = TrieNode()
        for match in matches:
            if match.length == length:
                self._collect(root, match, context)
        return Found(root, sum(length >= bound for bound in _EVIDENCE_LENGTHS)) if root.children else None

    def _collect(self, root: TrieNode, match: Match, context: list[int]) -> None:
        shorter = match.length // 2
        if match.num_places < _ENOUGH_PLACES and shorter >= _MIN_LENGTH:
            wider = self._index.shorten(context, match, shorter)
            for continuation in self._index.continuations(wider, _MAX_PLACES, _NUM_TOKENS):
                root.insert(continuation, 1.0)
        for continuation in self._index.continuations(match, _MAX_PLACES, _NUM_TOKENS):
            root.insert(continuation, _LONGEST_WEIGHT)


def predict_in_trie(node: TrieNode, evidence: int) -> Prediction | None:
    """How the continuations went on from here."""
    if not node.children:
        return None
    total = sum(child.weight for child in node.children.values()) + _UNSEEN
    return best({token_id: child.weight / total for token_id, child in node.children.items()}, evidence)
