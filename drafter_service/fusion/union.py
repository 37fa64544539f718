"""One tree from many guessers: the union of their guesses, best first, until the round's nodes are used up.

Row 0 is the root. To expand a row every guesser that can follow the path so far is asked what comes next; a
candidate named by several is one node (their longest common prefix merges), and its value is the path's estimated
probability of being accepted. Values fall along a path, so taking the best candidate over and over yields the
most valuable nodes there are, parents first.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from drafter_service.fusion.acceptance_estimate import Judge, JudgedPlace
from drafter_service.grammar_preference import may_follow
from drafter_service.guesser import Guesser, PathGuesser, Stated
from easyspec.speculation.growing_tree import GrowingTree, follow
from easyspec.speculation.sources import NO_SOURCES, DraftSources
from easyspec.speculation.token_tree import ScoredTree

_MAX_LEVELS = 32
_MAX_TOTAL = 0.995
# Where others have spoken, n-grams are asked on paths worth as much: on lesser ones, of which there are more, they
# change nothing that the verifier would notice, and they are the slowest to ask.
_MIN_NGRAM_VALUE = 0.2
_LEAST_VALUE = 1e-300  # has a logarithm
_SOURCE_OF: Mapping[Guesser, DraftSources] = {
    Guesser.MODEL: DraftSources.MODEL,
    Guesser.OWN_TEXT: DraftSources.RETRIEVAL,
    Guesser.DATASTORE: DraftSources.RETRIEVAL,
    Guesser.NGRAM: DraftSources.NGRAM,
}
# Bits of the tokens that may follow a path, as `GrammarPreference.allowed_after` has them.
AllowedAfter: TypeAlias = Callable[[Sequence[int]], "NDArray[np.uint8] | None"]


@dataclass(frozen=True)
class FusedTree:
    """The tree of a round, where each node came from, everything that was looked at, by row, and how long n-grams were
    asked."""

    scored: ScoredTree
    node_sources: tuple[DraftSources, ...]
    places: Mapping[int, JudgedPlace]
    ngram_ns: int = 0


class _GrowingUnion(GrowingTree):
    """A fused tree while it grows. Values are probabilities here: nothing below `min_value` is kept."""

    def __init__(
        self,
        guessers: Sequence[PathGuesser],
        judge: Judge,
        min_value: float,
        allowed_after: AllowedAfter | None,
        clock_ns: Callable[[], int],
    ) -> None:
        super().__init__()
        self._clock_ns = clock_ns
        self.ngram_ns = 0
        self._guessers = guessers
        self._judge = judge
        self._min_value = min_value
        self._allowed_after = allowed_after
        self._cursors: list[list[Any | None]] = []
        # Negative value, number (the older wins a tie), row of the parent, token, the guessers that named it.
        self._heap: list[tuple[float, int, int, int, int]] = []
        self._num_pushed = 0
        self._values = [1.0]  # by row
        self.node_sources: list[DraftSources] = []
        self.places: dict[int, JudgedPlace] = {}

    def expand(self, row: int) -> None:
        """Look at what may follow the path to `row`; rows are expanded in order, each once."""
        depth = self.depths[row] + 1
        if row == 0:
            cursors = [guesser.root() for guesser in self._guessers]
        else:
            token_id, before = self.token_ids[row - 1], self._cursors[self.parent_rows[row - 1]]
            moved = zip(self._guessers, before, strict=True)
            cursors = [None if cursor is None else guesser.step(cursor, token_id) for guesser, cursor in moved]
        self._cursors.append(cursors)
        if depth > _MAX_LEVELS:
            return
        stated: dict[Guesser, Stated] = {}
        for guesser, cursor in zip(self._guessers, cursors, strict=True):
            is_ngram = guesser.kind is Guesser.NGRAM
            if cursor is None or (is_ngram and stated and self._values[row] < _MIN_NGRAM_VALUE):
                continue
            begun_ns = self._clock_ns() if is_ngram else 0
            if (said := guesser.state(cursor, depth)) is not None:
                stated[guesser.kind] = said
            self.ngram_ns += self._clock_ns() - begun_ns if is_ngram else 0
        bits = self._allowed_after(self.path_token_ids(row)) if stated and self._allowed_after is not None else None
        if bits is not None:  # guessers that name nothing else than what is forbidden are left out
            for kind, said in [*stated.items()]:
                allowed = {token: value for token, value in said.probabilities.items() if may_follow(bits, token)}
                if allowed:
                    stated[kind] = Stated(allowed, said.evidence)
                else:
                    del stated[kind]
        if not stated:
            return
        place = self.places[row] = self._judge.judge(stated, depth)
        scale = self._values[row] / max(1.0, sum(place.probabilities.values()) / _MAX_TOTAL)
        for token_id, probability in place.probabilities.items():
            value = scale * probability
            if value >= self._min_value:
                heapq.heappush(self._heap, (-value, self._num_pushed, row, token_id, place.cases[token_id]))
                self._num_pushed += 1

    def add_best(self) -> int | None:
        """Make the most valuable candidate a node and return its row; None if there is none worth it."""
        if not self._heap:
            return None
        negative_value, _, parent_row, token_id, case = heapq.heappop(self._heap)
        self.node_sources.append(_sources_of(case))
        self._values.append(-negative_value)
        return self.add(parent_row, token_id, math.log(max(-negative_value, _LEAST_VALUE)))


@cache
def _sources_of(case: int) -> DraftSources:
    """The sources that named a candidate."""
    sources = NO_SOURCES
    for guesser, source in _SOURCE_OF.items():
        if case // 3**guesser % 3 == 1:
            sources |= source
    return sources


def fuse(
    guessers: Sequence[PathGuesser],
    judge: Judge,
    num_nodes: int,
    min_value: float = 0.0,
    allowed_after: AllowedAfter | None = None,
    clock_ns: Callable[[], int] = time.monotonic_ns,
) -> FusedTree:
    """The `num_nodes` most valuable nodes of all guesses, fewer where they are worth less than `min_value`.

    `allowed_after` says what a grammar lets follow a path, if there is one; `clock_ns` times n-grams.
    """
    growing = _GrowingUnion(guessers, judge, min_value, allowed_after, clock_ns)
    row: int | None = 0
    while row is not None and row < num_nodes:  # the last is not expanded
        growing.expand(row)
        row = growing.add_best()
    return FusedTree(growing.scored(), tuple(growing.node_sources), growing.places, growing.ngram_ns)


def learn(fused: FusedTree, chosen: Sequence[int], judge: Judge) -> None:
    """Learn from the tokens that were chosen after `fused` was drafted: accepted ones, then the bonus token."""
    for row, token_id, _ in follow(fused.scored.tree, chosen):
        if row in fused.places:
            judge.observe(fused.places[row], token_id)
