"""How deep the K and V of one session reach, and the hidden states from which what left early goes on.

Committed tokens go through the layers exactly, in order of position: tokens that wait at a deeper exit stand before
tokens that wait at an earlier one, and others have K and V as deep as the session goes. Nodes of the tree
go by the session's layer plan, and are forgotten with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Look:
    """What one exit said about one row: the confidence of the row's whole level, and the candidates that count."""

    confidence: float
    token_ids: tuple[int, ...]


class ExitState:
    """One session's exits: `exits` are numbers of layers, rising, those of all `num_layers` at most; a level leaves at
    one of them.

    `looks` holds, by expanded row, what the exits said there; `exit_of_row` the one whose candidates were taken.
    """

    def __init__(self, exits: Sequence[int], num_layers: int) -> None:
        self.exits = tuple(exits)
        self.is_whole_asked = self.exits[-1] == num_layers
        self.looks: dict[int, list[Look]] = {}
        self.exit_of_row: dict[int, int] = {}
        self.num_counted = 1
        self.began_ns: int | None = None
        self._committed: list[torch.Tensor | None] = [None] * len(self.exits)
        self._nodes: dict[int, tuple[int, torch.Tensor]] = {}

    @property
    def last_exit(self) -> int:
        return len(self.exits) - 1

    @property
    def early_rows(self) -> dict[int, int]:
        """Rows whose children do not come from all layers, and the exit that they come from, from 1."""
        first_whole = self.last_exit if self.is_whole_asked else len(self.exits)
        return {row: index + 1 for row, index in self.exit_of_row.items() if index < first_whole}

    @property
    def num_waiting(self) -> int:
        """Committed tokens that have left early."""
        return sum(self.num_waiting_at(exit_index) for exit_index in range(self.last_exit))

    def num_waiting_at(self, exit_index: int) -> int:
        waiting = self._committed[exit_index]
        return 0 if waiting is None else len(waiting)

    def waiting_positions(self, exit_index: int, num_cached: int) -> range:
        """Where the committed tokens stand that wait at an exit."""
        stop = num_cached - sum(self.num_waiting_at(earlier) for earlier in range(exit_index))
        return range(stop - self.num_waiting_at(exit_index), stop)

    def waiting_hidden(self, exit_index: int) -> torch.Tensor:
        """Their hidden states [tokens, E]."""
        waiting = self._committed[exit_index]
        assert waiting is not None, "tokens wait"
        return waiting

    def arrive(self, exit_index: int, hidden: torch.Tensor) -> None:
        """Committed tokens have come to an exit: new ones to the first, all that waited before it to another."""
        if exit_index > 0:
            self._committed[exit_index - 1] = None
        if exit_index < self.last_exit:
            before = self._committed[exit_index]
            self._committed[exit_index] = hidden if before is None else torch.cat([before, hidden])

    def nodes_at(self, exit_index: int, rows: Sequence[int]) -> list[int]:
        """Those of `rows` that wait at an exit."""
        return [row for row in rows if row in self._nodes and self._nodes[row][0] == exit_index]

    def node_hidden(self, row: int) -> torch.Tensor:
        """The hidden state [E] of a node that waits."""
        return self._nodes[row][1]

    def is_whole(self, row: int) -> bool:
        """Whether an expanded node has K and V as deep as the session goes."""
        return row not in self._nodes

    def nodes_arrive(self, exit_index: int, rows: Sequence[int], hidden: torch.Tensor) -> None:
        """Nodes have come to an exit with `hidden` [rows, E], and may stay there."""
        for row, row_hidden in zip(rows, hidden, strict=True):
            if exit_index < self.last_exit:
                self._nodes[row] = (exit_index, row_hidden)
            else:
                self._nodes.pop(row, None)

    def begin_round(self, num_counted: int) -> None:
        """Forget the tree; of each row's candidates `num_counted` will count."""
        self.looks, self.exit_of_row, self._nodes = {}, {}, {}
        self.num_counted = num_counted
