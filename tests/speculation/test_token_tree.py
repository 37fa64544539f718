from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyspec.errors import InvalidTreeError
from easyspec.speculation.token_tree import EMPTY_TREE, ScoredTree, TokenTree
from tests.speculation.strategies import token_trees

V = 5
BRANCHES = TokenTree((1, 2, 3, 3, 4), (0, 0, 1, 2, 4))


def test_rows_of_a_tree() -> None:
    assert len(BRANCHES) == 5
    assert BRANCHES.row_depths == (0, 1, 1, 2, 2, 3)
    assert BRANCHES.num_levels == 3
    assert BRANCHES.children == ({1: 1, 2: 2}, {3: 3}, {3: 4}, {}, {4: 5}, {})
    assert [BRANCHES.path_rows(row) for row in (0, 3, 5)] == [(), (1, 3), (2, 4, 5)]


@given(token_trees(V), st.data())
@settings(derandomize=True, deadline=None)
def test_after_some_tokens_the_guesses_below_them_are_left(tree: TokenTree, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(tree)))
    path = [tree.token_ids[above - 1] for above in tree.path_rows(row)]
    rest = tree.after(path)
    rest.check(V, len(tree))
    below = {tree.path_rows(each) for each in range(len(tree) + 1) if row in (0, *tree.path_rows(each)) and each != row}
    texts = {tuple(tree.token_ids[each - 1] for each in rows[len(path) :]) for rows in below}
    assert {tuple(rest.token_ids[each - 1] for each in rest.path_rows(r)) for r in range(1, len(rest) + 1)} == texts
    assert tree.after([*path, V]) == EMPTY_TREE


def test_the_empty_tree() -> None:
    EMPTY_TREE.check(V, 0)
    assert (len(EMPTY_TREE), EMPTY_TREE.num_levels, EMPTY_TREE.row_depths) == (0, 0, (0,))


@given(token_trees(V))
@settings(derandomize=True, deadline=None)
def test_well_formed_trees_pass(tree: TokenTree) -> None:
    tree.check(V, len(tree))
    for row in range(len(tree) + 1):
        assert len(tree.path_rows(row)) == tree.row_depths[row]
    for row in range(1, len(tree) + 1):
        assert tree.children[tree.parent_rows[row - 1]][tree.token_ids[row - 1]] == row


MALFORMED = {
    "fewer parents": (TokenTree((1, 2), (0,)), "tree.parent_rows is '1 entries'; allowed: 2, one per token"),
    "more parents": (TokenTree((1,), (0, 1)), "tree.parent_rows is '2 entries'; allowed: 1, one per token"),
    "too many nodes": (
        TokenTree((0, 1, 2, 3), (0, 0, 0, 0)),
        "tree.token_ids is '4 nodes'; allowed: at most 3",
    ),
    "its own parent": (TokenTree((1,), (1,)), "tree.parent_rows[0] is 1; allowed: 0 to 0, parents first"),
    "a later parent": (
        TokenTree((1, 2, 3), (0, 3, 0)),
        "tree.parent_rows[1] is 3; allowed: 0 to 1, parents first",
    ),
    "negative parent": (
        TokenTree((1, 2), (0, -1)),
        "tree.parent_rows[1] is -1; allowed: 0 to 1, parents first",
    ),
    "unknown token": (TokenTree((1, V), (0, 0)), f"tree.token_ids[1] is {V}; allowed: 0 to {V - 1}"),
    "negative token": (TokenTree((-1,), (0,)), f"tree.token_ids[0] is -1; allowed: 0 to {V - 1}"),
    "twin siblings": (
        TokenTree((1, 2, 2), (0, 1, 1)),
        "tree.token_ids[2] is 2; allowed: siblings with distinct tokens",
    ),
}


@pytest.mark.parametrize(("tree", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_tree_is_refused_by_field_and_value(tree: TokenTree, message: str) -> None:
    with pytest.raises(InvalidTreeError) as refused:
        tree.check(V, 3)
    assert str(refused.value) == message
    assert message.startswith(refused.value.field)


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_pruning_keeps_the_most_valuable_nodes_as_a_tree(data: st.DataObject) -> None:
    tree = data.draw(token_trees(V, max_nodes=10))
    log_values: list[float] = []
    for parent_row in tree.parent_rows:
        # Zero steps make ties between parent and child.
        step = data.draw(st.sampled_from([0.0, -0.5, -1.0]))
        log_values.append(step + (log_values[parent_row - 1] if parent_row else 0.0))
    num_nodes = data.draw(st.integers(0, len(tree) + 2))
    pruned = ScoredTree(tree, tuple(log_values)).pruned(num_nodes).tree
    pruned.check(V, num_nodes)
    assert len(pruned) == min(num_nodes, len(tree))

    def paths(of: TokenTree) -> list[tuple[int, ...]]:
        return [tuple(of.token_ids[row - 1] for row in of.path_rows(node + 1)) for node in range(len(of))]

    order = sorted(range(len(tree)), key=lambda node: (-log_values[node], node))
    assert paths(pruned) == [paths(tree)[node] for node in sorted(order[:num_nodes])]
