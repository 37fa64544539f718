"""Ways to choose a tree's nodes from what all guessers say, for `bench.replay`: the drafter's heap and its rivals.

All ask the same guessers and the same estimate and learn from the same verdicts; they differ in which paths they look
at and which nodes they keep.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate, JudgedPlace, RequestBias
from drafter_service.fusion.union import FusedTree, GrowingUnion, fuse
from drafter_service.guesser import PathGuesser

_SearchFunction = Callable[[Sequence[PathGuesser], AcceptanceEstimate, RequestBias, int, float], FusedTree]
# ADED's own number of simulated walks.
_NUM_WALKS = 150


@dataclass(frozen=True)
class Search:
    """A way to search, by name."""

    name: str
    run: _SearchFunction

    def __call__(
        self,
        guessers: Sequence[PathGuesser],
        estimate: AcceptanceEstimate,
        bias: RequestBias,
        num_nodes: int,
        min_value: float,
    ) -> FusedTree:
        return self.run(guessers, estimate, bias, num_nodes, min_value)


def _exploring(strength: float) -> _SearchFunction:
    """The heap by value x (1 + strength / sqrt(1 + verdicts on such guesses)): an upper confidence bound."""

    class Exploring(GrowingUnion):
        def _push(self, row: int, place: JudgedPlace) -> None:
            for token_id, probability in place.probabilities.items():
                num_seen = max(
                    curve.num_observed
                    for curve, said in zip(place.curves, place.stated, strict=True)
                    if token_id in said.probabilities
                )
                bonus = 1.0 + strength / math.sqrt(1.0 + num_seen)
                value = min(1.0, self.values[row] * probability * bonus)
                if value >= self._min_value:
                    heapq.heappush(self._heap, (-value, self._num_pushed, row, token_id, place.cases[token_id]))
                    self._num_pushed += 1

    def search(
        guessers: Sequence[PathGuesser],
        estimate: AcceptanceEstimate,
        bias: RequestBias,
        num_nodes: int,
        min_value: float,
    ) -> FusedTree:
        growing = Exploring(guessers, estimate, bias, min_value)
        growing.expand(0)
        for num_left in reversed(range(num_nodes)):
            row = growing.add_best()
            if row is None:
                break
            if num_left:
                growing.expand(row)
        return growing.finished()

    return search


class _Walks:
    """Monte Carlo tree search (PUCT) over the union of all guesses; a walk's reward is the probability of its path."""

    def __init__(self, growing: GrowingUnion, curiosity: float) -> None:
        self._growing = growing
        self._curiosity = curiosity
        self._row_of: dict[tuple[int, int], int] = {}
        self.num_visits = [0]
        self._rewards = [0.0]
        growing.expand(0)

    def walk(self) -> None:
        """From the root down to a node that nobody saw before, or to where nobody knows on."""
        growing, row, passed = self._growing, 0, [0]
        while row in growing.places and growing.places[row].probabilities:
            token_id = self._choose(row)
            known = self._row_of.get((row, token_id))
            if known is None:
                row = self._open(row, token_id)
                passed.append(row)
                break
            row = known
            passed.append(row)
        for each in passed:
            self.num_visits[each] += 1
            self._rewards[each] += growing.values[row]

    def _choose(self, row: int) -> int:
        place, num_visits = self._growing.places[row], self.num_visits[row]

        def promise(token_id: int) -> float:
            child = self._row_of.get((row, token_id))
            seen = self.num_visits[child] if child is not None else 0
            reward = self._rewards[child] / seen if child is not None and seen else 0.0
            return reward + self._curiosity * place.probabilities[token_id] * math.sqrt(1 + num_visits) / (1 + seen)

        return max(place.probabilities, key=promise)

    def _open(self, row: int, token_id: int) -> int:
        growing, place = self._growing, self._growing.places[row]
        value = growing.values[row] * place.probabilities[token_id]
        opened = self._row_of[row, token_id] = growing.add_named(row, token_id, place.cases[token_id], value)
        self.num_visits.append(0)
        self._rewards.append(0.0)
        growing.expand(opened)
        return opened


def _monte_carlo(curiosity: float) -> _SearchFunction:
    """The nodes visited most, after so many walks."""

    def search(
        guessers: Sequence[PathGuesser],
        estimate: AcceptanceEstimate,
        bias: RequestBias,
        num_nodes: int,
        min_value: float,
    ) -> FusedTree:
        growing = GrowingUnion(guessers, estimate, bias, min_value)
        walks = _Walks(growing, curiosity)
        for _ in range(max(_NUM_WALKS, 2 * num_nodes)):
            walks.walk()
        rows = sorted(range(1, len(walks.num_visits)), key=lambda row: (-walks.num_visits[row], row))[:num_nodes]
        return _kept(growing, sorted(rows))

    return search


def _kept(growing: GrowingUnion, rows: Sequence[int]) -> FusedTree:
    """The tree of some rows, whose parents are among them."""
    whole = growing.finished()
    new_row = {0: 0} | {row: index for index, row in enumerate(rows, start=1)}
    kept = GrowingUnion((), AcceptanceEstimate(), RequestBias())
    for row in rows:
        kept.add_named(new_row[growing.parent_rows[row - 1]], growing.token_ids[row - 1], 0, growing.values[row])
    kept.places.update({new_row[row]: place for row, place in whole.places.items() if row in new_row})
    return kept.finished()


SEARCHES = (
    Search("heap", fuse),
    Search("explore-0.5", _exploring(0.5)),
    Search("explore-2", _exploring(2.0)),
    Search("mcts-0.3", _monte_carlo(0.3)),
    Search("mcts-1", _monte_carlo(1.0)),
    Search("mcts-4", _monte_carlo(4.0)),
)
