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
    `committed` has, by exit, the hidden states [tokens, E] of the committed tokens that wait there; `nodes`, by row,
    the exit where an expanded node waits, and its hidden state [E].
    """

    def __init__(self, exits: Sequence[int], num_layers: int) -> None:
        self.exits = tuple(exits)
        self.is_whole_asked = self.exits[-1] == num_layers
        self.looks: dict[int, list[Look]] = {}
        self.exit_of_row: dict[int, int] = {}
        self.num_counted = 1
        self.began_ns: int | None = None
        self.committed: dict[int, torch.Tensor] = {}
        self.nodes: dict[int, tuple[int, torch.Tensor]] = {}

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
        return sum(map(len, self.committed.values()))

    def num_waiting_at(self, exit_index: int) -> int:
        return len(self.committed.get(exit_index, ()))

    def waiting_positions(self, exit_index: int, num_cached: int) -> range:
        """Where the committed tokens stand that wait at an exit."""
        stop = num_cached - sum(self.num_waiting_at(earlier) for earlier in range(exit_index))
        return range(stop - self.num_waiting_at(exit_index), stop)

    def arrive(self, exit_index: int, hidden: torch.Tensor) -> None:
        """Committed tokens have come to an exit: new ones to the first, all that waited before it to another."""
        self.committed.pop(exit_index - 1, None)
        if exit_index < self.last_exit:
            before = self.committed.get(exit_index)
            self.committed[exit_index] = hidden if before is None else torch.cat([before, hidden])

    def nodes_arrive(self, exit_index: int, rows: Sequence[int], hidden: torch.Tensor) -> None:
        """Nodes have come to an exit with `hidden` [rows, E], and may stay there."""
        for row, row_hidden in zip(rows, hidden, strict=True):
            if exit_index < self.last_exit:
                self.nodes[row] = (exit_index, row_hidden)
            else:
                self.nodes.pop(row, None)

    def begin_round(self, num_counted: int) -> None:
        """Forget the tree; of each row's candidates `num_counted` will count."""
        self.looks, self.exit_of_row, self.nodes = {}, {}, {}
        self.num_counted = num_counted
