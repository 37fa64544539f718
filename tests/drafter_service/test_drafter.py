"""Trees: well-formed, within the budget, the same in any company, and as good as the draft model is."""

from __future__ import annotations

import random
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drafter_service.session import OpenTask
from easyspec.errors import (
    CapacityError,
    EasyspecError,
    InvalidRequestError,
    PromptTooLongError,
    StalePositionError,
    UnknownModelError,
)
from easyspec.model.row_layout import RowLayout
from easyspec.speculation.messages import OpenSpeculation
from easyspec.speculation.parameters import LayerPlanRequest, MlpPlacement, SamplingParameters, TreeBudget
from easyspec.speculation.token_tree import TokenTree
from tests.drafter_service.core_driver import (
    BUDGET,
    GREEDY,
    MAX_TREE_NODES,
    PAPER,
    SAMPLED,
    SEQUENTIAL,
    STAGED,
    CoreDriver,
    build_core,
    deepest_path,
)
from tests.fakes.checkpoints import VOCAB_SIZE

CONTEXT = 256
PROMPT = (2, 3, 5, 7, 11, 13)


def random_prompt(rng: random.Random, most: int = 150) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, most)))


def random_budget(rng: random.Random) -> TreeBudget:
    return TreeBudget(rng.randrange(1, 7), rng.randrange(1, 7), rng.choice([1, 2, 3, 8, 16, 64]))


def test_trees_are_trees_within_their_budget(core: CoreDriver) -> None:
    rng = random.Random(2)
    for _ in range(25):
        prompt, budget = random_prompt(rng), random_budget(rng)
        session_id = core.open(prompt, rng.choice([GREEDY, SAMPLED]), rng.choice([SEQUENTIAL, PAPER, STAGED]))
        said: tuple[int, ...] = (rng.randrange(VOCAB_SIZE),)
        length = len(prompt)
        for _ in range(2):
            tree = core.draft(session_id, length, said, budget)
            tree.check(VOCAB_SIZE, budget.num_nodes)
            assert tree.num_levels <= budget.num_levels
            # At most 8 candidates a row: a budget that large is filled.
            most = 8 * (1 + (budget.num_levels - 1) * budget.width)
            assert len(tree) == min(budget.num_nodes, most)
            length += len(said)
            said = (*deepest_path(tree), 1)
        core.close(session_id)


def test_a_session_gets_the_same_trees_alone_and_in_any_company(core: CoreDriver) -> None:
    """Sessions of other plans, budgets, lengths and temperatures share its passes."""
    rng = random.Random(3)
    plans = [SEQUENTIAL, STAGED, STAGED, PAPER, replace(STAGED, calibration=False)]
    asked = [
        (random_prompt(rng), rng.choice([GREEDY, SAMPLED]), rng.choice(plans), random_budget(rng)) for _ in range(12)
    ]

    def rounds(members: list[int]) -> dict[int, list[TokenTree]]:
        session_ids = {member: core.open(*asked[member][:3]) for member in members}
        trees: dict[int, list[TokenTree]] = {member: [] for member in members}
        said: dict[int, tuple[int, ...]] = {member: (member,) for member in members}
        lengths = {member: len(asked[member][0]) for member in members}
        for _ in range(3):
            tasks = [
                core.ask(session_ids[member], lengths[member], said[member], asked[member][3]) for member in members
            ]
            for member, draft in zip(members, core.finish(tasks), strict=True):
                trees[member].append(draft.tree)
                lengths[member] += len(said[member])
                said[member] = (*deepest_path(draft.tree), member)
        for session_id in session_ids.values():
            core.close(session_id)
        return trees

    together = rounds(list(range(12)))
    for member in range(12):
        assert rounds([member])[member] == together[member], asked[member]


@pytest.mark.parametrize("plan", [SEQUENTIAL, STAGED])
@pytest.mark.parametrize("most", [CONTEXT, 40])
def test_trees_get_shallower_at_the_end_of_the_context_and_of_the_session(
    core: CoreDriver, plan: LayerPlanRequest, most: int
) -> None:
    prompt = tuple(range(most - 8))
    session_id = core.open(prompt, SAMPLED, plan, max_total_length=most)
    levels = []
    for length in range(len(prompt), most):
        levels.append(core.draft(session_id, length, (length,), TreeBudget(6, 2, 64)).num_levels)
    assert levels[0] == 6
    if most == CONTEXT:  # the last expanded node stands at the last position
        assert levels[-4:] == [4, 3, 2, 1]
    with pytest.raises(InvalidRequestError, match=f"{most + 1} tokens.*{most} in all"):
        core.finish([core.ask(session_id, most, (1,), BUDGET)])
    core.close(session_id)
    assert core.memory.num_used_slots == 0


def test_greedy_and_sampled_trees_differ_by_their_noise(core: CoreDriver) -> None:
    def tree(sampling: SamplingParameters) -> TokenTree:
        session_id = core.open(PROMPT, sampling)
        drafted = core.draft(session_id, len(PROMPT), (17,))
        core.close(session_id)
        return drafted

    assert tree(SAMPLED) == tree(SAMPLED)
    assert (
        len({tree(GREEDY), tree(SAMPLED), tree(replace(SAMPLED, seed=18)), tree(replace(SAMPLED, temperature=2))}) == 4
    )


BAD_OPENINGS: list[tuple[dict[str, Any], type[EasyspecError], str]] = [
    ({"prompt_token_ids": ()}, InvalidRequestError, r"prompt_token_ids is \[\]"),
    ({"prompt_token_ids": (1, VOCAB_SIZE)}, InvalidRequestError, f"prompt_token_ids is {VOCAB_SIZE}"),
    ({"prompt_token_ids": (1,) * CONTEXT}, PromptTooLongError, f"{CONTEXT} tokens.*below {CONTEXT}"),
    ({"sampling": SamplingParameters(1, -1.0)}, InvalidRequestError, r"sampling.temperature is -1.0"),
    ({"sampling": SamplingParameters(1, float("nan"))}, InvalidRequestError, r"sampling.temperature is nan"),
    ({"layer_plan": LayerPlanRequest(0)}, InvalidRequestError, r"layer_parallel_size is 0; allowed: 1 to 6"),
    ({"layer_plan": LayerPlanRequest(7)}, InvalidRequestError, r"layer_parallel_size is 7; allowed: 1 to 6"),
    ({"model": "gpt-9"}, UnknownModelError, "'gpt-9' is not served here; served: draft"),
]


def failure(future: Future[Any]) -> BaseException:
    error = future.exception(0)
    assert error is not None, "no failure"
    return error


@pytest.mark.parametrize(("changes", "error", "message"), BAD_OPENINGS)
def test_a_bad_opening_names_field_and_value_and_holds_nothing(
    core: CoreDriver, changes: dict[str, Any], error: type[EasyspecError], message: str
) -> None:
    task = OpenTask(replace(OpenSpeculation(PROMPT, GREEDY), **changes))
    core.drafter.accept(task)
    with pytest.raises(error, match=message) as refusal:
        task.future.result(0)
    assert type(refusal.value) is error
    assert core.drafter.usage().num_sessions == 0
    assert core.memory.num_used_slots == 0


BAD_CALIBRATIONS: list[tuple[int, tuple[int, ...], TreeBudget, type[EasyspecError], str]] = [
    (5, (1,), BUDGET, StalePositionError, "base_length is 5; the session stands at 6"),
    (7, (1,), BUDGET, StalePositionError, "base_length is 7; the session stands at 6"),
    (6, (), BUDGET, InvalidRequestError, r"calibration.token_ids is \[\]"),
    (6, (1, 999), BUDGET, InvalidRequestError, "calibration.token_ids is 999"),
    (6, (1,), replace(BUDGET, num_levels=0), InvalidRequestError, "budget.num_levels is 0; allowed: 1 to 64"),
    (6, (1,), replace(BUDGET, width=0), InvalidRequestError, "budget.width is 0; allowed: 1 to 64"),
    (6, (1,), replace(BUDGET, width=65), InvalidRequestError, "budget.width is 65"),
    (6, (1,), replace(BUDGET, num_nodes=0), InvalidRequestError, "budget.num_nodes is 0"),
    (6, (1,), replace(BUDGET, num_nodes=65), InvalidRequestError, "budget.num_nodes is 65; allowed: 1 to 64"),
    (6, (1,), TreeBudget(9, 9, 64), InvalidRequestError, r"budget.width is 9; allowed: width x \(num_levels - 1\)"),
]


@pytest.mark.parametrize(("base_length", "token_ids", "budget", "error", "message"), BAD_CALIBRATIONS)
def test_a_bad_calibration_changes_nothing(
    core: CoreDriver,
    base_length: int,
    token_ids: tuple[int, ...],
    budget: TreeBudget,
    error: type[EasyspecError],
    message: str,
) -> None:
    session_id, beside = core.open(PROMPT, SAMPLED), core.open(PROMPT, SAMPLED)
    bad = core.ask(session_id, base_length, token_ids, budget)
    with pytest.raises(error, match=message) as refusal:
        bad.future.result(0)
    assert type(refusal.value) is error
    assert core.draft(session_id, 6, (1,)) == core.draft(beside, 6, (1,))
    core.close(session_id)
    core.close(beside)


def test_a_second_calibration_while_one_is_under_way_is_stale(core: CoreDriver) -> None:
    session_id = core.open(PROMPT)
    first = core.ask(session_id, 6, (1,), BUDGET)
    for base_length in (6, 7):
        assert isinstance(failure(core.ask(session_id, base_length, (1,), BUDGET).future), StalePositionError)
    assert core.finish([first])[0].base_length == 7
    core.close(session_id)
    assert "an open session" in str(failure(core.ask(session_id, 7, (1,), BUDGET).future))


def test_a_session_that_does_not_fit_is_refused_and_changes_nothing(draft_folder: Path) -> None:
    core = build_core(draft_folder, num_kv_slots=140)
    first = core.open(tuple(range(70)))  # 70 slots, of 140
    core.draft(first, 70, (1,))
    with pytest.raises(CapacityError, match="71 token slots wanted, 60 of 140 free"):  # 7 and a tree of 64
        core.open(tuple(range(50, 57)))
    assert core.drafter.usage().num_sessions == 1
    core.close(first)
    core.close(first)
    second = core.open(PROMPT)
    assert len(core.draft(second, 6, (1,))) > 0
    core.close(second)
    assert core.memory.num_used_slots == core.drafter.usage().num_sessions == 0


def test_the_youngest_gives_its_memory_to_the_older_and_is_told_so(draft_folder: Path) -> None:
    core = build_core(draft_folder, num_kv_slots=240)
    alone = [core.draft(session_id := core.open(PROMPT), 6, (1,)), core.close(session_id)][0]
    old, young = core.open(PROMPT), core.open(tuple(range(60, 110)))
    waiting = core.ask(young, 50, (1,), BUDGET)
    core.finish([waiting])
    assert core.draft(old, 6, (1,)) == alone
    core.finish([core.ask(old, 7, (5,) * 165, BUDGET)])  # 172 slots and a tree, of 240
    usage = core.drafter.usage()
    assert (usage.num_sessions, usage.num_preemptions) == (1, 1)
    for _ in range(2):
        with pytest.raises(CapacityError, match="taken back for older ones"):
            core.ask(young, 51, (1,), BUDGET).future.result(0)
    core.close(young)
    assert "an open session" in str(failure(core.ask(young, 51, (1,), BUDGET).future))
    core.close(old)
    assert core.memory.num_used_slots == 0


def test_one_who_waits_for_a_tree_is_told_at_once_that_its_memory_is_gone(draft_folder: Path) -> None:
    core = build_core(draft_folder, num_kv_slots=240)
    old, young = core.open(PROMPT), core.open(tuple(range(60, 110)))
    core.finish([core.ask(old, 6, (1,), BUDGET), core.ask(young, 50, (1,), BUDGET)])
    both = [core.ask(old, 7, (5,) * 165, BUDGET), core.ask(young, 51, (1,), BUDGET)]
    assert core.finish(both[:1])[0].base_length == 172
    assert isinstance(failure(both[1].future), CapacityError)
    core.close(old)
    core.close(young)
    assert core.memory.num_used_slots == 0


@pytest.mark.parametrize("num_kv_slots", [128, 144])
def test_a_session_that_loses_its_memory_takes_no_part_in_the_pass(
    draft_folder: Path, monkeypatch: pytest.MonkeyPatch, num_kv_slots: int
) -> None:
    """Or its rows would be written into slots that are free, or another session's."""
    core = build_core(draft_folder, num_kv_slots=num_kv_slots)

    def watched(layout: RowLayout, *args: Any, **kwargs: Any) -> Any:
        assert set(layout.rows.slots.tolist()).isdisjoint(core.memory._free)
        return forward(layout, *args, **kwargs)

    forward = core.model.decoder.forward
    monkeypatch.setattr(core.model.decoder, "forward", watched)
    old, young, wide = core.open(PROMPT), core.open(tuple(range(60, 110))), TreeBudget(9, 8, 64)
    both = [core.ask(young, 50, (1,), wide)]
    for _ in range(5):  # it gets ahead by some levels
        core.drafter.step()
    both.append(core.ask(old, 6, (1,), wide))
    while not all(task.future.done() for task in both):
        core.drafter.step()
    assert core.drafter.usage().num_preemptions == 1
    core.close(old)
    core.close(young)
    assert core.memory.num_used_slots == 0


def test_a_late_session_joins_at_the_next_level(core: CoreDriver) -> None:
    first, late = core.open(PROMPT), core.open(PROMPT[:4])
    deep = core.ask(first, 6, (1,), TreeBudget(6, 2, 64))
    core.drafter.step()
    core.drafter.step()
    assert not deep.future.done()
    shallow = core.ask(late, 4, (1,), TreeBudget(2, 2, 64))
    core.drafter.step()
    assert shallow.future.done()
    assert not deep.future.done()
    core.finish([deep])
    core.close(first)
    core.close(late)


@pytest.mark.parametrize("plan", [STAGED, replace(STAGED, calibration=False)])
def test_trees_are_the_same_from_a_shared_prefix(draft_folder: Path, plan: LayerPlanRequest) -> None:
    """Fuzzy entries are never shared: the text comes back with an accepted path of a fuzzy tree in it."""
    sharing, alone = build_core(draft_folder), build_core(draft_folder, share_prefixes=False)
    trees: list[list[TokenTree]] = []
    for core in (sharing, alone):
        trees.append([])
        text = list(range(100, 40, -1))
        for _ in range(4):
            session_id = core.open(text, SAMPLED, plan)
            said: tuple[int, ...] = (9,)
            for _ in range(3):
                tree = core.draft(session_id, len(text), said)
                trees[-1].append(tree)
                text += said
                said = (*deepest_path(tree), 7)
            core.close(session_id)
    assert trees[0] == trees[1]
    usage = sharing.drafter.usage()
    assert usage.num_prefix_hit_tokens > 100
    assert usage.num_used_slots == 0
    assert usage.num_cached_slots > 60
    assert alone.drafter.usage().num_prefix_hit_tokens == alone.drafter.usage().num_cached_slots == 0


def test_an_opening_that_was_given_up_leaves_nothing(core: CoreDriver) -> None:
    task = OpenTask(OpenSpeculation(PROMPT, GREEDY))
    assert task.future.cancel()
    core.drafter.accept(task)
    assert core.drafter.usage().num_sessions == core.memory.num_used_slots == 0


def test_closing_between_verdict_and_tree_frees_everything(core: CoreDriver) -> None:
    gone, stays = core.open(PROMPT), core.open(PROMPT)
    core.ask(gone, 6, (1,), BUDGET)
    waiting = core.ask(stays, 6, (1,), BUDGET)
    core.close(gone)
    assert core.finish([waiting])[0].base_length == 7
    core.close(stays)
    assert core.memory.num_used_slots == 0


def test_much_that_was_committed_at_once_is_read_as_a_prompt_is(draft_folder: Path) -> None:
    """As after many rounds that left the draft model out: no other session waits for one long pass."""
    said, trees = tuple(range(10, 110)), []
    for most_rows in (512, 32):
        core = build_core(draft_folder, prefill_chunk=most_rows, max_batch_rows=most_rows)
        rows_of_passes: list[int] = []
        forward = core.model.decoder.forward

        def counted(layout: RowLayout, *rest: Any, forward: Any = forward, rows: list[int] = rows_of_passes) -> Any:
            rows.append(sum(layout.num_rows))
            return forward(layout, *rest)

        core.model.decoder.forward = counted  # type: ignore[method-assign, assignment]
        session_id = core.open(PROMPT)
        core.draft(session_id, 6, (1,))
        trees.append(core.draft(session_id, 7, said))
        assert max(rows_of_passes) == (len(said) if most_rows == 512 else 32)
    assert trees[0] == trees[1]


def test_plans_are_the_requests_or_the_services(core: CoreDriver) -> None:
    """Unset fields take the default plan, whose groups are of 4, staged."""

    def tree(plan: LayerPlanRequest) -> TokenTree:
        session_id = core.open(PROMPT, SAMPLED, plan)
        drafted = core.draft(session_id, 6, (1,), TreeBudget(5, 4, 64))
        core.close(session_id)
        return drafted

    assert tree(LayerPlanRequest()) == tree(STAGED) == tree(LayerPlanRequest(4))
    assert tree(LayerPlanRequest(mlp=MlpPlacement.SEQUENTIAL)) == tree(PAPER)
    assert len({tree(STAGED), tree(PAPER), tree(SEQUENTIAL)}) == 3
    assert MAX_TREE_NODES == 64


def test_a_pass_has_no_more_rows_than_it_may_and_everybody_gets_the_tree_of_a_wider_one(draft_folder: Path) -> None:
    trees: dict[int, list[TokenTree]] = {}
    for max_batch_rows in (512, 7):
        core = build_core(draft_folder, max_batch_rows=max_batch_rows)
        rows_of_passes: list[int] = []
        decoder = core.model.decoder
        forward = decoder.forward

        def counted(layout: RowLayout, *rest: Any, forward: Any = forward, rows: list[int] = rows_of_passes) -> Any:
            rows.append(sum(layout.num_rows))
            return forward(layout, *rest)

        decoder.forward = counted  # type: ignore[method-assign, assignment]
        sessions = [core.open([*range(1, 6 + index)], plan=PAPER) for index in range(6)]
        for index, session_id in enumerate(sessions):  # prompts are read one by one, and do not count
            core.draft(session_id, 5 + index, [7])
        rows_of_passes.clear()
        asked = [core.ask(session_id, 6 + index, [8, 9], BUDGET) for index, session_id in enumerate(sessions)]
        trees[max_batch_rows] = [draft.tree for draft in core.finish(asked)]
        assert max(rows_of_passes) <= max_batch_rows
        assert all(len(tree) == BUDGET.num_nodes for tree in trees[max_batch_rows])
    assert trees[7] == trees[512]
