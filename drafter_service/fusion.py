"""One tree from many guessers: the union of their guesses, best first, until the round's nodes are used up.

Row 0 is the root. To expand a row every guesser that can follow the path so far is asked what comes next; a
candidate named by several is one node (their longest common prefix merges), and its value is the path's estimated
probability of being accepted. Values fall along a path, so taking the best candidate over and over yields the
most valuable nodes there are, parents first.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from drafter_service.acceptance_estimate import (
    AcceptanceEstimate,
    Candidate,
    Guesser,
    JudgedPlace,
    RequestBias,
    Stated,
)
from easyspec.speculation.sources import NO_SOURCES, DraftSources
from easyspec.speculation.token_tree import ScoredTree, TokenTree

MAX_LEVELS = 32
"""Deepest level of a fused tree."""

_MAX_TOTAL = 0.995
_SOURCE_OF: Mapping[Guesser, DraftSources] = {
    Guesser.MODEL: DraftSources.MODEL,
    Guesser.OWN_TEXT: DraftSources.RETRIEVAL,
    Guesser.DATASTORE: DraftSources.RETRIEVAL,
    Guesser.NGRAM: DraftSources.NGRAM,
}


class PathGuesser(Protocol):
    """A guesser at work on one round of one request. A cursor is its own idea of a path."""

    @property
    def kind(self) -> Guesser: ...

    def root(self) -> object | None:
        """The cursor of the committed text; None if there is nothing to say."""

    def step(self, cursor: object, token_id: int) -> object | None:
        """The cursor one token further; None if there is nothing to say from there on."""

    def state(self, cursor: object, depth: int) -> Stated | None:
        """What comes next, at level `depth`; None if it does not know."""


@dataclass(frozen=True)
class FusedTree:
    """The tree of a round, where each node came from, and everything that was looked at, by row."""

    scored: ScoredTree
    node_sources: tuple[DraftSources, ...]
    places: Mapping[int, JudgedPlace]

    @property
    def tree(self) -> TokenTree:
        """The nodes without their values."""
        return self.scored.tree


class _Growing:
    """A fused tree while it grows."""

    def __init__(self, guessers: Sequence[PathGuesser], estimate: AcceptanceEstimate, bias: RequestBias) -> None:
        self._guessers = guessers
        self._estimate = estimate
        self._bias = bias
        self._cursors: list[list[object | None]] = [[guesser.root() for guesser in guessers]]
        self.values = [0.0]  # by row, log-probabilities
        self._depths = [0]
        self._heap: list[tuple[float, int, int, Candidate]] = []
        self._num_pushed = 0
        self.token_ids: list[int] = []
        self.parent_rows: list[int] = []
        self.node_sources: list[DraftSources] = []
        self.places: dict[int, JudgedPlace] = {}

    def expand(self, row: int) -> None:
        """Look at what may follow the path to `row`."""
        depth = self._depths[row] + 1
        if depth > MAX_LEVELS:
            return
        stated = {
            guesser.kind: said
            for guesser, cursor in zip(self._guessers, self._cursors[row], strict=True)
            if cursor is not None and (said := guesser.state(cursor, depth)) is not None
        }
        if not stated:
            return
        place = self._estimate.judge(stated, depth, self._bias)
        self.places[row] = place
        total = sum(candidate.probability for candidate in place.candidates)
        value = self.values[row] - math.log(max(1.0, total / _MAX_TOTAL))
        for candidate in place.candidates:
            negative_value = -value - math.log(candidate.probability)
            heapq.heappush(self._heap, (negative_value, self._num_pushed, row, candidate))
            self._num_pushed += 1

    def add_best(self, min_log_value: float) -> int | None:
        """Make the most valuable candidate a node and return its row; None if there is none worth it."""
        if not self._heap or -self._heap[0][0] < min_log_value:
            return None
        negative_value, _, parent_row, candidate = heapq.heappop(self._heap)
        self.token_ids.append(candidate.token_id)
        self.parent_rows.append(parent_row)
        self.node_sources.append(_sources_of(candidate.case))
        self.values.append(-negative_value)
        self._depths.append(self._depths[parent_row] + 1)
        self._cursors.append(
            [
                guesser.step(cursor, candidate.token_id) if cursor is not None else None
                for guesser, cursor in zip(self._guessers, self._cursors[parent_row], strict=True)
            ]
        )
        return len(self.token_ids)


def _sources_of(case: int) -> DraftSources:
    """The sources that named a candidate."""
    sources = NO_SOURCES
    for guesser, source in _SOURCE_OF.items():
        if case // 3**guesser % 3 == 1:
            sources |= source
    return sources


def fuse(
    guessers: Sequence[PathGuesser],
    estimate: AcceptanceEstimate,
    bias: RequestBias,
    num_nodes: int,
    min_value: float = 0.0,
) -> FusedTree:
    """The `num_nodes` most valuable nodes of all guesses, fewer where they are worth less than `min_value`."""
    growing = _Growing(guessers, estimate, bias)
    min_log_value = math.log(min_value) if min_value > 0.0 else -math.inf
    growing.expand(0)
    for num_left in reversed(range(num_nodes)):
        row = growing.add_best(min_log_value)
        if row is None:
            break
        if num_left:
            growing.expand(row)
    tree = TokenTree(tuple(growing.token_ids), tuple(growing.parent_rows))
    return FusedTree(ScoredTree(tree, tuple(growing.values[1:])), tuple(growing.node_sources), growing.places)


def learn(fused: FusedTree, chosen: Sequence[int], estimate: AcceptanceEstimate, bias: RequestBias) -> None:
    """Learn from the tokens that were chosen after `fused` was drafted: accepted ones, then the bonus token."""
    row: int | None = 0
    for token_id in chosen:
        place = fused.places.get(row) if row is not None else None
        if row is None or place is None:
            return
        estimate.observe(place, token_id, bias)
        row = fused.tree.children[row].get(token_id)
