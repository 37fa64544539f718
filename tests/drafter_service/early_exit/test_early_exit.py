"""Levels that leave the model early: what is caught up is exact, and nobody reads what was never written."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drafter_service.early_exit.exits import MAX_WAITING
from drafter_service.early_exit.gate import ExitGate, LevelView, Stage
from drafter_service.model.exit_state import Look
from easyspec.errors import InvalidRequestError
from easyspec.model.row_layout import RowLayout
from easyspec.speculation.parameters import LayerPlanRequest, TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import TokenTree
from tests.drafter_service.core_driver import (
    BUDGET,
    GREEDY,
    PAPER,
    SAMPLED,
    SEQUENTIAL,
    STAGED,
    CoreDriver,
    build_core,
    deepest_path,
)
from tests.fakes.checkpoints import VOCAB_SIZE, change_config
from tests.model.passes import cached

PROMPT = tuple(random.Random(1).randrange(VOCAB_SIZE) for _ in range(121))  # the rounds go on from here
EXITS = (2, 4)
NUM_LAYERS = 6
ONE_LEVEL = TreeBudget(1, 1, 1)
EARLY = DraftSources.EARLY_EXIT
BOTH = DraftSources.EARLY_EXIT | DraftSources.MODEL
TOLERANCE = 1e-5

Decide = Callable[[Stage, LevelView], bool]


@dataclass
class ScriptedGate(ExitGate):
    """Goes on where it is told to; remembers what it heard."""

    decide: Decide

    def __post_init__(self) -> None:
        self.num_decided = 0
        self.stages: list[Stage] = []
        self.choices: list[tuple[Look, ...]] = []
        self.rounds: list[tuple[int, int]] = []

    def goes_on(self, stage: Stage, levels: Sequence[LevelView]) -> list[bool]:
        self.num_decided += len(levels)
        return [self.decide(stage, level) for level in levels]

    def observe_stage(self, stage: Stage, seconds: float) -> None:
        assert seconds >= 0.0
        self.stages.append(stage)

    def observe_choice(self, target: str, looks: Sequence[Look], token_id: int) -> None:
        self.choices.append(tuple(looks))

    def observe_round(self, target: str, seconds: float, num_tokens: int, num_right: int) -> None:
        assert seconds > 0.0
        self.rounds.append((num_tokens, num_right))


def always(stage: Stage, level: LevelView) -> bool:
    return True


def never(stage: Stage, level: LevelView) -> bool:
    return False


def by_chance(seed: int, share: float = 0.7) -> Decide:
    generator = random.Random(seed)
    return lambda stage, level: generator.random() < share


def every_second_level(stage: Stage, level: LevelView) -> bool:
    return level.depth % 2 == 0


@pytest.fixture(scope="module")
def exits_folder(draft_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(draft_folder, tmp_path_factory.mktemp("exits"), dirs_exist_ok=True))
    change_config(folder, exit_layers=[*EXITS, NUM_LAYERS])
    return folder


@pytest.fixture(scope="module")
def gate() -> ScriptedGate:
    return ScriptedGate(always)


@pytest.fixture(scope="module")
def exits_core(exits_folder: Path, gate: ScriptedGate) -> CoreDriver:
    return build_core(exits_folder, share_prefixes=False, gate=gate)


def rounds(
    core: CoreDriver,
    plan: LayerPlanRequest,
    sources: DraftSources,
    num_rounds: int = 5,
    prompt: Sequence[int] = PROMPT,
) -> tuple[int, list[int], list[TokenTree]]:
    """A session after rounds that accepted all or most of a deepest path, its tokens, and its trees."""
    session_id = core.open(prompt, SAMPLED, plan, sources=sources)
    tokens, trees = [*prompt], []
    said: Sequence[int] = (9,)
    for round_ in range(num_rounds):
        trees.append(core.draft(session_id, len(tokens), said))
        tokens += said
        path = deepest_path(trees[-1])
        said = (*path[: len(path) - round_ % 2], 7)
    return session_id, tokens, trees


def fresh_kv(core: CoreDriver, tokens: Sequence[int]) -> torch.Tensor:
    """Keys and values of a session that reads `tokens` whole, [L * H, tokens, D + D]."""
    session_id = core.open(tokens[:-1])
    core.draft(session_id, len(tokens) - 1, tokens[-1:], ONE_LEVEL)
    kv = core.kv(session_id, len(tokens))
    core.close(session_id)
    return kv


def layers_of(core: CoreDriver, num_layers: int) -> int:
    """Planes of the first layers."""
    return num_layers * core.memory.pool.keys.shape[1]


@pytest.mark.parametrize("plan", [SEQUENTIAL, PAPER, STAGED])
def test_with_gates_that_always_go_on_the_trees_are_the_models(
    exits_core: CoreDriver, gate: ScriptedGate, plan: LayerPlanRequest
) -> None:
    """The model's, that is, by the plan that has its borders at the exits."""
    gate.decide = always
    early_id, tokens, trees = rounds(exits_core, plan, BOTH)
    model_id = exits_core.open(PROMPT, SAMPLED, plan)
    exits_core.state(model_id).request = replace(
        exits_core.state(model_id).request, plan=exits_core.state(early_id).request.plan
    )
    base_length, said = len(PROMPT), [9]
    for index, tree in enumerate(trees):
        assert exits_core.draft(model_id, base_length, said) == tree
        base_length += len(said)
        path = deepest_path(tree)
        said = [*path[: len(path) - index % 2], 7]
    torch.testing.assert_close(
        exits_core.kv(early_id, len(tokens)), exits_core.kv(model_id, len(tokens)), rtol=0.0, atol=TOLERANCE
    )
    exits_core.close(early_id)
    exits_core.close(model_id)


@pytest.mark.parametrize("plan", [SEQUENTIAL, STAGED])
@pytest.mark.parametrize("decide", [never, every_second_level, by_chance(3)])
def test_committed_tokens_are_exact_as_deep_as_they_have_come(
    exits_core: CoreDriver, gate: ScriptedGate, plan: LayerPlanRequest, decide: Decide
) -> None:
    """And after a level that goes all the way, in every layer: then the KV is that of a session that never left."""
    gate.decide = decide
    session_id, tokens, _ = rounds(exits_core, plan, BOTH)
    exits = exits_core.state(session_id).exits
    assert exits is not None
    kv, expected = exits_core.kv(session_id, len(tokens)), fresh_kv(exits_core, tokens)
    depth_of = [NUM_LAYERS] * len(tokens)
    for index, depth in enumerate(EXITS):
        for position in exits.waiting_positions(index, len(tokens)):
            depth_of[position] = depth
    assert depth_of == sorted(depth_of, reverse=True)
    if decide is never:
        assert depth_of.count(EXITS[0]) == len(tokens) - len(PROMPT) + 1  # the last prompt token is a calibration's
    for position, depth in enumerate(depth_of):
        planes = layers_of(exits_core, depth)
        torch.testing.assert_close(kv[:planes, position], expected[:planes, position], rtol=0.0, atol=TOLERANCE)
    gate.decide = always
    exits_core.draft(session_id, len(tokens), [3], ONE_LEVEL)
    tokens.append(3)
    torch.testing.assert_close(
        exits_core.kv(session_id, len(tokens)), fresh_kv(exits_core, tokens), rtol=0.0, atol=TOLERANCE
    )
    exits_core.close(session_id)


@pytest.mark.parametrize("decide", [every_second_level, by_chance(4, 0.85), by_chance(5, 0.85)])
def test_nodes_that_are_caught_up_are_as_if_they_had_never_left(
    exits_core: CoreDriver, gate: ScriptedGate, decide: Decide
) -> None:
    """With single layers nothing is fuzzy: a node's K and V are those of its path read as text, in all its layers."""
    gate.decide = decide
    gate.stages.clear()
    session_id, tokens, _ = rounds(exits_core, SEQUENTIAL, BOTH, num_rounds=3)
    state = exits_core.state(session_id)
    tree, exits = state.tree, state.exits
    assert tree is not None
    assert exits is not None
    num_deep = 0
    for row, slot in state.tree_slots.items():
        index = exits.nodes[row][0] if row in exits.nodes else len(EXITS)
        planes = layers_of(exits_core, (*EXITS, NUM_LAYERS)[index])
        text = [*tokens, *tree.path_token_ids(row)]
        kv = cached(exits_core.memory.pool, np.array([slot]))[:planes, 0]
        torch.testing.assert_close(kv, fresh_kv(exits_core, text)[:planes, -1], rtol=0.0, atol=TOLERANCE)
        num_deep += index == len(EXITS)
    assert num_deep > 0
    assert any(stage.catches_up for stage in gate.stages) or decide is every_second_level
    exits_core.close(session_id)


@pytest.mark.parametrize("plan", [SEQUENTIAL, STAGED, replace(STAGED, calibration=False)])
@pytest.mark.parametrize("sources", [EARLY, BOTH])
def test_nobody_reads_what_was_never_written(
    exits_core: CoreDriver, gate: ScriptedGate, plan: LayerPlanRequest, sources: DraftSources
) -> None:
    """The same rounds over memory full of zeros and of junk; whoever read some of it would guess something else."""
    outcomes = []
    for junk in (0.0, 77.0):
        generator = torch.Generator().manual_seed(5)
        for plane in (exits_core.memory.pool.keys, exits_core.memory.pool.values):
            plane.copy_(junk * torch.randn(plane.shape, generator=generator))
        gate.decide = by_chance(6)
        session_id, _, trees = rounds(exits_core, plan, sources, num_rounds=8)
        state = exits_core.state(session_id)
        assert state.tree is not None
        outcomes.append((trees, state.tree.log_values))
        exits_core.close(session_id)
    assert outcomes[0] == outcomes[1]


def test_sessions_that_leave_at_different_exits_share_passes(exits_core: CoreDriver, gate: ScriptedGate) -> None:
    """Side by side each has the trees that it has alone."""

    def by_session(stage: Stage, level: LevelView) -> bool:
        return (level.confidence > 0.5) == (level.depth % 2 == 0)

    gate.decide = by_session
    prompts = [PROMPT[: 90 + 10 * index] for index in range(3)]
    kinds = [BOTH, EARLY, BOTH]
    alone = []
    for prompt, sources in zip(prompts, kinds, strict=True):
        session_id, _, trees = rounds(exits_core, STAGED, sources, num_rounds=1, prompt=prompt)
        alone += trees
        exits_core.close(session_id)
    ids = [
        exits_core.open(prompt, SAMPLED, STAGED, sources=sources)
        for prompt, sources in zip(prompts, kinds, strict=True)
    ]
    asked = [exits_core.ask(one, len(prompt), [9], BUDGET) for one, prompt in zip(ids, prompts, strict=True)]
    assert [draft.tree for draft in exits_core.finish(asked)] == alone
    for session_id in ids:
        exits_core.close(session_id)


def test_passes_are_of_bounded_size(
    exits_core: CoreDriver, gate: ScriptedGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits in many sessions may be many rows; in pieces it comes to the same."""
    counts: list[int] = []
    early_exits = exits_core.early_exits
    forward_between = early_exits._decoder.forward_between

    def counted(layout: RowLayout, *rest: Any) -> torch.Tensor:
        counts.append(sum(layout.num_rows))
        return forward_between(layout, *rest)

    monkeypatch.setattr(early_exits._decoder, "forward_between", counted)
    outcomes = []
    for most_rows in (512, 6):
        monkeypatch.setattr(early_exits, "_max_batch_rows", most_rows)
        gate.decide = every_second_level
        ids = [exits_core.open(PROMPT[: 90 + index], SAMPLED, STAGED, sources=BOTH) for index in range(3)]
        counts.clear()
        asked = [exits_core.ask(one, 90 + index, [9, 8], BUDGET) for index, one in enumerate(ids)]
        outcomes.append([draft.tree for draft in exits_core.finish(asked)])
        for session_id in ids:
            exits_core.close(session_id)
    assert outcomes[0] == outcomes[1]
    assert max(counts) <= 2 * BUDGET.width  # those of one session, with those they descend from


def test_alone_it_never_goes_deeper_than_the_last_early_exit(exits_core: CoreDriver, gate: ScriptedGate) -> None:
    gate.decide = always
    gate.stages.clear()
    session_id, _, _ = rounds(exits_core, STAGED, EARLY)
    assert {stage.exit_index for stage in gate.stages} == {0}
    exits = exits_core.state(session_id).exits
    assert exits is not None
    assert exits.exits == EXITS
    assert exits.num_waiting == 0
    exits_core.close(session_id)


def test_a_session_does_not_gather_waiting_tokens_without_bound(exits_core: CoreDriver, gate: ScriptedGate) -> None:
    gate.decide = never
    session_id = exits_core.open(PROMPT[:20], GREEDY, STAGED, sources=BOTH)
    exits = exits_core.state(session_id).exits
    assert exits is not None
    length, most = 20, 0
    for _ in range(30):
        exits_core.draft(session_id, length, (5, 6, 7, 8, 9))
        length += 5
        most = max(most, exits.num_waiting)
    assert MAX_WAITING // 2 < most < 2 * (MAX_WAITING + 5)  # at two exits
    exits_core.close(session_id)


def test_what_a_session_leaves_as_a_prefix_is_whole(exits_folder: Path) -> None:
    core = build_core(exits_folder, gate=ScriptedGate(never))
    session_id, tokens, _ = rounds(core, STAGED, BOTH)
    core.close(session_id)
    num_hit_tokens = core.memory.num_hit_tokens
    kv = fresh_kv(core, tokens)
    assert core.memory.num_hit_tokens - num_hit_tokens == len(PROMPT) - 1
    other = build_core(exits_folder, share_prefixes=False)
    torch.testing.assert_close(kv, fresh_kv(other, tokens), rtol=0.0, atol=TOLERANCE)


def test_the_gate_hears_what_the_exits_said_where_the_verdict_came(exits_core: CoreDriver, gate: ScriptedGate) -> None:
    gate.decide = every_second_level
    gate.choices.clear()
    gate.rounds.clear()
    session_id, _, trees = rounds(exits_core, STAGED, BOTH, num_rounds=2)
    num_levels = trees[0].num_levels
    assert gate.rounds == [(num_levels + 1, num_levels)]
    assert [len(looks) for looks in gate.choices] == [1 + 2 * (depth % 2 == 0) for depth in range(1, num_levels + 1)]
    assert all(len(look.token_ids) == BUDGET.num_nodes // BUDGET.num_levels for looks in gate.choices for look in looks)
    exits_core.close(session_id)


def test_a_checkpoint_without_exits_refuses_and_says_why(core: CoreDriver) -> None:
    with pytest.raises(InvalidRequestError, match="sources is 'early_exit'; allowed: some of model"):
        core.open(PROMPT, sources=EARLY)
