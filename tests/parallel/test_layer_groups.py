from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyspec.errors import InvalidRequestError
from easyspec.parallel.layer_groups import LayerPlan, paper_plan, parse_plan, sequential_plan
from easyspec.speculation.parameters import MlpPlacement

SEQUENTIAL, STAGED = MlpPlacement.SEQUENTIAL, MlpPlacement.STAGED


@pytest.mark.parametrize(
    ("num_layers", "size", "groups", "num_slots"),
    [
        # The paper's table: Llama-3-8B and Qwen2-7B.
        (32, 4, "0 | 1-3 | 4-7 | 8-11 | 12-15 | 16-19 | 20-23 | 24-27 | 28-30 | 31", 10),
        (28, 4, "0 | 1-3 | 4-7 | 8-11 | 12-15 | 16-19 | 20-23 | 24-26 | 27", 9),
        (12, 3, "0 | 1-2 | 3-5 | 6-8 | 9-10 | 11", 6),
        (12, 6, "0 | 1-5 | 6-10 | 11", 4),
        (12, 12, "0 | 1-10 | 11", 3),
        (5, 2, "0 | 1 | 2-3 | 4", 4),
        (3, 2, "0 | 1 | 2", 3),
        (2, 2, "0 | 1", 2),
        (1, 1, "0", 1),
    ],
)
def test_the_papers_rule(num_layers: int, size: int, groups: str, num_slots: int) -> None:
    plan = paper_plan(num_layers, size, SEQUENTIAL)
    assert str(plan) == groups
    assert len(plan.groups) == num_slots
    assert plan.num_layers == num_layers


def test_the_papers_own_exception_is_an_explicit_list() -> None:
    """Llama-3.2-1B with N = 2: 0, 1-2, 3-4, ..., 13-14, 15 is not what the rule gives."""
    text = "0 | " + " | ".join(f"{layer}-{layer + 1}" for layer in range(1, 15, 2)) + " | 15"
    plan = parse_plan(text, 16, SEQUENTIAL)
    assert len(plan.groups) == 9
    assert plan != paper_plan(16, 2, SEQUENTIAL)


@given(num_layers=st.integers(1, 100), data=st.data(), mlp=st.sampled_from(MlpPlacement))
def test_a_plan_covers_every_layer_in_order(num_layers: int, data: st.DataObject, mlp: MlpPlacement) -> None:
    size = data.draw(st.integers(1, num_layers))
    plan = paper_plan(num_layers, size, mlp)
    assert [layer for group in plan.groups for layer in group] == list(range(num_layers))
    assert all(1 <= len(group) <= size for group in plan.groups)
    assert len(plan.groups[0]) == len(plan.groups[-1]) == 1  # the ends stay alone
    assert parse_plan(str(plan), num_layers, plan.mlp) == plan
    assert plan.is_sequential == all(len(group) == 1 for group in plan.groups)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), mlp=st.sampled_from(MlpPlacement))
def test_any_explicit_list_survives_a_round_trip(sizes: list[int], mlp: MlpPlacement) -> None:
    starts = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
    groups = tuple(range(start, stop) for start, stop in itertools.pairwise(starts))
    plan = LayerPlan(groups, mlp)
    assert parse_plan(str(plan), sum(sizes), mlp) == plan
    assert plan.is_sequential == (set(sizes) == {1})


@pytest.mark.parametrize(
    ("groups", "depths", "expected"),
    [
        ("0 | 1-3 | 4-7 | 8-10 | 11", (6, 9), "0 | 1-3 | 4-5 | 6-8 | 9-10 | 11"),  # 6-7 and 8 join
        ("0 | 1-3 | 4-7 | 8-10 | 11", (4, 8), "0 | 1-3 | 4-7 | 8-10 | 11"),
        ("0 | 1-5 | 6-10 | 11", (3,), "0 | 1-2 | 3-5 | 6-10 | 11"),  # a group that was not cut stays alone
        ("0-5", (2, 4), "0-1 | 2-3 | 4-5"),
        ("0 | 1 | 2 | 3", (2,), "0 | 1 | 2 | 3"),
        ("0 | 1-4 | 5-8 | 9", (3, 7), "0 | 1-2 | 3-6 | 7-8 | 9"),
    ],
)
def test_groups_are_cut_at_exits(groups: str, depths: tuple[int, ...], expected: str) -> None:
    num_layers = int(groups.replace("|", "-").split("-")[-1]) + 1
    assert str(parse_plan(groups, num_layers, STAGED).cut_at(depths)) == expected


@given(st.integers(1, 40), st.data(), st.sampled_from(MlpPlacement))
def test_a_cut_plan_has_a_border_at_every_exit(num_layers: int, data: st.DataObject, mlp: MlpPlacement) -> None:
    plan = paper_plan(num_layers, data.draw(st.integers(1, num_layers)), mlp)
    depths = sorted(data.draw(st.sets(st.integers(1, num_layers))))
    cut = plan.cut_at(depths)
    assert cut.mlp is plan.mlp
    assert [layer for group in cut.groups for layer in group] == [*range(num_layers)]
    assert {*depths} <= {group.stop for group in cut.groups}
    assert max(len(group) for group in cut.groups) <= max(len(group) for group in plan.groups)
    assert cut.cut_at(depths) == cut


@pytest.mark.parametrize("mlp", MlpPlacement)
def test_size_one_is_the_sequential_plan(mlp: MlpPlacement) -> None:
    assert paper_plan(7, 1, mlp) == sequential_plan(7)
    assert sequential_plan(7).is_sequential
    assert not paper_plan(7, 3, mlp).is_sequential


@pytest.mark.parametrize("size", [-1, 0, 13])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"layer_parallel_size is {size}; allowed: 1 to 12"):
        paper_plan(12, size, SEQUENTIAL)


@pytest.mark.parametrize("text", ["0|1-3|4", " 0 |1 - 3| 4 ", "0-0 | 1-3 | 4-4"])
def test_blanks_and_single_ranges_are_read(text: str) -> None:
    plan = parse_plan(text, 5, STAGED)
    assert plan.groups == (range(1), range(1, 4), range(4, 5))
    assert plan.mlp is STAGED


@pytest.mark.parametrize(
    ("text", "part", "expected_first"),
    [
        ("", "", 0),
        ("   ", "", 0),
        ("1-3", "1-3", 0),
        ("0 | 2-4", "2-4", 1),
        ("0 | 1-3 | 3-4", "3-4", 4),
        ("0 | 3-1 | 4", "3-1", 1),
        ("0 | 1-0 | 4", "1-0", 1),
        ("0 || 1-4", "", 1),
        ("0 | 1-4 |", "", 5),
        ("0 | one | 4", "one", 1),
        ("0 | 1-2-3 | 4", "1-2-3", 1),
        ("0 | -1 | 4", "-1", 1),
        ("0, 1-4", "0, 1-4", 0),
        ("0 | 1- | 4", "1-", 1),
        ("0 | 1.5 | 4", "1.5", 1),
        (f"0 | 1-{'9' * 5000}", f"1-{'9' * 5000}", 1),
    ],
)
def test_a_malformed_part_is_named(text: str, part: str, expected_first: int) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_plan(text, 5, SEQUENTIAL)
    assert caught.value.field == "layer_groups"
    assert caught.value.value == part
    assert caught.value.allowed == f"FIRST or FIRST-LAST with FIRST = {expected_first}"


@pytest.mark.parametrize("text", ["0", "0 | 1-3", "0 | 1-5", "0 | 1-3 | 4 | 5"])
def test_too_few_or_too_many_layers_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="every layer from 0 to 4, in order") as caught:
        parse_plan(text, 5, SEQUENTIAL)
    assert caught.value.value == text


@given(text=st.text(alphabet="0123456789-| ,x", max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        plan = parse_plan(text, 6, SEQUENTIAL)
    except InvalidRequestError:
        return
    assert [layer for group in plan.groups for layer in group] == list(range(6))
