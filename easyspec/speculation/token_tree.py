"""Draft trees: plain data, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from easyspec.errors import InvalidTreeError


@dataclass(frozen=True)
class TokenTree:
    """Guesses for what follows the committed tokens.

    Row 0 is the root: the last committed token, not stored here. Node `i` is row `i + 1`.
    `parent_rows[i] <= i` is the row of node i's parent, so parents come before children and the
    columns of a pass are in topological order.
    """

    token_ids: tuple[int, ...] = ()
    parent_rows: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def row_depths(self) -> tuple[int, ...]:
        """Depth of every row, root included: `[0, ...]`, one more entry than nodes."""
        depths = [0]
        for parent_row in self.parent_rows:
            depths.append(depths[parent_row] + 1)
        return tuple(depths)

    @property
    def num_levels(self) -> int:
        """Levels below the root."""
        return max(self.row_depths)

    @cached_property
    def children(self) -> tuple[dict[int, int], ...]:
        """For every row, its children's rows by token id."""
        children: list[dict[int, int]] = [{} for _ in range(len(self) + 1)]
        for node, (token_id, parent_row) in enumerate(zip(self.token_ids, self.parent_rows, strict=True)):
            children[parent_row][token_id] = node + 1
        return tuple(children)

    def child(self, row: int, token_id: int) -> int | None:
        """The row of the child of `row` that carries the token."""
        return self.children[row].get(token_id)

    def path_rows(self, row: int) -> tuple[int, ...]:
        """Rows from the root's child down to `row`; empty for the root itself."""
        path = []
        while row > 0:
            path.append(row)
            row = self.parent_rows[row - 1]
        return tuple(reversed(path))

    def after(self, token_ids: Sequence[int]) -> TokenTree:
        """What it guesses after `token_ids`: the part below the node that they lead to; empty if they lead to none."""
        root: int | None = 0
        for token_id in token_ids:
            root = self.children[root].get(token_id) if root is not None else None
        if root is None:
            return EMPTY_TREE
        new_row = {root: 0}
        for node, parent_row in enumerate(self.parent_rows):
            if parent_row in new_row:
                new_row[node + 1] = len(new_row)
        rows = [row for row in new_row if row != root]
        parents = tuple(new_row[self.parent_rows[row - 1]] for row in rows)
        return TokenTree(tuple(self.token_ids[row - 1] for row in rows), parents)

    def check(self, vocab_size: int, max_nodes: int) -> None:
        """Raise InvalidTreeError unless this is a tree over the vocabulary with distinct siblings."""
        if len(self.token_ids) != len(self.parent_rows):
            raise InvalidTreeError(
                "tree.parent_rows", f"{len(self.parent_rows)} entries", f"{len(self.token_ids)}, one per token"
            )
        if len(self) > max_nodes:
            raise InvalidTreeError("tree.token_ids", f"{len(self)} nodes", f"at most {max_nodes}")
        for node, (token_id, parent_row) in enumerate(zip(self.token_ids, self.parent_rows, strict=True)):
            if not 0 <= parent_row <= node:
                raise InvalidTreeError(f"tree.parent_rows[{node}]", parent_row, f"0 to {node}, parents first")
            if not 0 <= token_id < vocab_size:
                raise InvalidTreeError(f"tree.token_ids[{node}]", token_id, f"0 to {vocab_size - 1}")
        places = [*zip(self.parent_rows, self.token_ids, strict=True)]
        if len(set(places)) < len(places):
            node = next(node for node, place in enumerate(places) if place in places[:node])
            raise InvalidTreeError(f"tree.token_ids[{node}]", self.token_ids[node], "siblings with distinct tokens")


EMPTY_TREE = TokenTree()


@dataclass(frozen=True)
class ScoredTree:
    """A tree whose nodes carry the estimated log-probability that the node is accepted.

    `log_values[i]` never exceeds the parent's, so any threshold keeps a tree.
    """

    tree: TokenTree
    log_values: tuple[float, ...]

    def pruned(self, num_nodes: int, least_log_value: float = -math.inf) -> ScoredTree:
        """The `num_nodes` most valuable nodes of those worth `least_log_value`; ties go to the earlier node."""
        worthy = [node for node, value in enumerate(self.log_values) if value >= least_log_value]
        nodes = sorted(sorted(worthy, key=lambda node: (-self.log_values[node], node))[:num_nodes])
        return ScoredTree(_subtree(self.tree, nodes), tuple(self.log_values[node] for node in nodes))


def _subtree(tree: TokenTree, nodes: Sequence[int]) -> TokenTree:
    new_row = {0: 0}
    token_ids, parent_rows = [], []
    for node in nodes:
        parent_row = tree.parent_rows[node]
        token_ids.append(tree.token_ids[node])
        parent_rows.append(new_row[parent_row])
        new_row[node + 1] = len(token_ids)
    return TokenTree(tuple(token_ids), tuple(parent_rows))
