from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyspec.speculation.acceptance import StopLimits, Walk, stop_limits
from easyspec.speculation.messages import Verdict
from easyspec.speculation.parameters import FinishReason, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from tests.speculation.reference import reference_walk
from tests.speculation.strategies import token_trees

V = 4
NEVER = StopLimits(frozenset(), 10**9)
CHAIN = TokenTree((5, 6, 7), (0, 1, 2))


def judge(tree: TokenTree, choices: Sequence[int], base_length: int, limits: StopLimits) -> Verdict:
    """The verdict of a walk along `choices`, one per row, root first."""
    walk = Walk(tree, base_length, limits)
    while walk.row is not None:
        walk.step(choices[walk.row])
    return walk.verdict()


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=250)
def test_the_walk_follows_its_literal_definition(data: st.DataObject) -> None:
    tree = data.draw(token_trees(V, max_nodes=15))
    size = len(tree) + 1
    choices = data.draw(st.lists(st.integers(0, V - 1), min_size=size, max_size=size))
    base_length = data.draw(st.integers(1, 20))
    stops = data.draw(st.frozensets(st.integers(0, V - 1), max_size=2))
    limits = StopLimits(stops, base_length + data.draw(st.integers(1, 8)))
    verdict = judge(tree, choices, base_length, limits)
    expected = reference_walk(tree, choices, base_length, limits)
    assert (verdict.token_ids, verdict.accepted_rows, verdict.finish_reason) == expected
    assert verdict.base_length == base_length
    accepted = [tree.token_ids[row - 1] for row in verdict.accepted_rows]
    assert accepted == list(verdict.token_ids[: verdict.num_accepted])
    stopped = verdict.finish_reason is FinishReason.STOP
    assert verdict.matched_stop_token_id == (verdict.token_ids[-1] if stopped else None)
    assert not stops.intersection(verdict.token_ids[:-1])


def test_an_empty_tree_yields_the_bonus_token() -> None:
    assert judge(EMPTY_TREE, [3], 8, NEVER) == Verdict(8, (3,), ())


def test_a_whole_path_and_its_bonus_token() -> None:
    assert judge(CHAIN, [5, 6, 7, 9], 8, NEVER) == Verdict(8, (5, 6, 7, 9), (1, 2, 3))


def test_the_first_wrong_guess_ends_the_walk() -> None:
    assert judge(CHAIN, [5, 9, 7, 9], 8, NEVER) == Verdict(8, (5, 9), (1,))


def test_the_walk_takes_the_branch_that_carries_the_choice() -> None:
    tree = TokenTree((1, 2, 3, 3, 4), (0, 0, 1, 2, 4))
    assert judge(tree, [2, 0, 3, 0, 4, 8], 1, NEVER) == Verdict(1, (2, 3, 4, 8), (2, 4, 5))


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_a_stop_at_every_offset(offset: int) -> None:
    choices = [5, 6, 7, 9]
    verdict = judge(CHAIN, choices, 8, StopLimits(frozenset({choices[offset], 100}), 10**9))
    assert verdict == Verdict(
        8, tuple(choices[: offset + 1]), (1, 2, 3)[: offset + 1], FinishReason.STOP, choices[offset]
    )


@pytest.mark.parametrize("room", [1, 2, 3, 4])
def test_the_length_limit_at_every_offset(room: int) -> None:
    verdict = judge(CHAIN, [5, 6, 7, 9], 8, StopLimits(frozenset(), 8 + room))
    assert verdict == Verdict(8, (5, 6, 7, 9)[:room], (1, 2, 3)[:room], FinishReason.LENGTH)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_a_stop_beats_the_length(offset: int) -> None:
    choices = [5, 6, 7, 9]
    verdict = judge(CHAIN, choices, 8, StopLimits(frozenset({choices[offset]}), 8 + offset + 1))
    assert verdict.finish_reason is FinishReason.STOP


def test_a_stop_after_the_length_does_not_count() -> None:
    verdict = judge(CHAIN, [5, 6, 7, 9], 8, StopLimits(frozenset({7}), 10))
    assert (verdict.token_ids, verdict.finish_reason) == ((5, 6), FinishReason.LENGTH)


def test_misuse_is_caught() -> None:
    with pytest.raises(AssertionError, match="no room after 8 of 8"):
        judge(EMPTY_TREE, [5], 8, StopLimits(frozenset(), 8))


def test_stop_limits_of_a_request() -> None:
    stop = StopConditions(max_tokens=10, stop_token_ids=frozenset({4}))
    assert stop_limits(stop, 5, [2], 100) == StopLimits(frozenset({2, 4}), 15)
    assert stop_limits(stop, 5, [2], 12) == StopLimits(frozenset({2, 4}), 12)
    ignoring = StopConditions(stop_token_ids=frozenset({4}), ignore_eos=True)
    assert stop_limits(ignoring, 5, [2], 100) == StopLimits(frozenset({4}), 100)
