"""A token tree while it grows, and the one way to follow chosen tokens down a tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from easyspec.speculation.token_tree import ScoredTree, TokenTree


class Followed(Protocol):
    """A tree of tokens whose row 0 is the root."""

    def child(self, row: int, token_id: int) -> int | None:
        """The row of the child of `row` that carries the token."""


def follow(tree: Followed, token_ids: Iterable[int]) -> Iterator[tuple[int, int, int | None]]:
    """Walk down from the root along chosen tokens: (row, token chosen there, its child's row) as far as there is one.

    The last step has None if the choice was not in the tree: its token is the bonus token.
    """
    row: int = 0
    for token_id in token_ids:
        child = tree.child(row, token_id)
        yield row, token_id, child
        if child is None:
            return
        row = child


def num_followed(tree: Followed, token_ids: Iterable[int]) -> int:
    """How many of the chosen tokens the tree has, from the first on."""
    return sum(child is not None for _, _, child in follow(tree, token_ids))


class GrowingTree:
    """Nodes in the order in which they were added, parents first; by row, `log_values` beginning with the root's 0."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.parent_rows: list[int] = []
        self.log_values = [0.0]
        self.depths = [0]
        self._row_of: dict[tuple[int, int], int] = {}

    def add(self, parent_row: int, token_id: int, log_value: float) -> int:
        """A new node, whose estimated log-probability of being accepted is `log_value`; returns its row."""
        self.token_ids.append(token_id)
        self.parent_rows.append(parent_row)
        self.log_values.append(log_value)
        self.depths.append(self.depths[parent_row] + 1)
        row = self._row_of[parent_row, token_id] = len(self.token_ids)
        return row

    def child(self, row: int, token_id: int) -> int | None:
        """The row of the child of `row` that carries the token."""
        return self._row_of.get((row, token_id))

    def path_rows(self, row: int) -> list[int]:
        """Rows from the root's child down to `row`; none for the root itself."""
        path: list[int] = []
        while row > 0:
            path.append(row)
            row = self.parent_rows[row - 1]
        return path[::-1]

    def path_token_ids(self, row: int) -> tuple[int, ...]:
        """The tokens from the root's child down to `row`."""
        return tuple(self.token_ids[above - 1] for above in self.path_rows(row))

    def scored(self) -> ScoredTree:
        """What has grown so far, with values."""
        return ScoredTree(TokenTree(tuple(self.token_ids), tuple(self.parent_rows)), tuple(self.log_values[1:]))
