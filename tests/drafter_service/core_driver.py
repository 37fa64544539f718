"""The drafter's core without its thread: tests step it themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from drafter_service.config import DrafterSettings
from drafter_service.drafter import Drafter
from drafter_service.early_exit.exits import EarlyExits
from drafter_service.early_exit.gate import ExitGate
from drafter_service.fusion.rounds import Rounds
from drafter_service.model.ahead import AheadDrafting
from drafter_service.model.drafting import ModelDrafting
from drafter_service.model.state import ModelState
from drafter_service.request import DrafterLimits
from drafter_service.session import DraftTask, OpenTask
from easyspec.engine.shell import CloseTask
from easyspec.model.kv_cache import KvMemory
from easyspec.model.loading import load_model
from easyspec.parallel.layer_groups import paper_plan
from easyspec.speculation.messages import Calibration, Draft, OpenSpeculation
from easyspec.speculation.parameters import LayerPlanRequest, MlpPlacement, SamplingParameters, TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import TokenTree
from tests.model.passes import cached

MAX_TREE_NODES = 64
GREEDY = SamplingParameters(seed=0, temperature=0.0)
SAMPLED = SamplingParameters(seed=17, temperature=0.7)
SEQUENTIAL = LayerPlanRequest(1)
PAPER = LayerPlanRequest(4, MlpPlacement.SEQUENTIAL)
STAGED = LayerPlanRequest(4, MlpPlacement.STAGED)
BUDGET = TreeBudget(num_levels=4, width=3, num_nodes=12)


@dataclass
class CoreDriver:
    """A drafter over a checkpoint, stepped by hand."""

    drafter: Drafter
    model: ModelDrafting
    early_exits: EarlyExits
    memory: KvMemory

    def open(
        self,
        prompt: Sequence[int],
        sampling: SamplingParameters = GREEDY,
        plan: LayerPlanRequest = SEQUENTIAL,
        max_total_length: int | None = None,
        sources: DraftSources | None = None,
    ) -> int:
        task = OpenTask(OpenSpeculation(tuple(prompt), sampling, plan, max_total_length, sources=sources))
        self.drafter.accept(task)
        return task.future.result(0)

    def ask(self, session_id: int, base_length: int, token_ids: Sequence[int], budget: TreeBudget) -> DraftTask:
        task = DraftTask(session_id, Calibration(base_length, tuple(token_ids), budget))
        self.drafter.accept(task)
        return task

    def finish(self, tasks: Sequence[DraftTask]) -> list[Draft]:
        """Step until all are answered."""
        while not all(task.future.done() for task in tasks):
            self.drafter.step()
        return [task.future.result(0) for task in tasks]

    def draft(
        self, session_id: int, base_length: int, token_ids: Sequence[int], budget: TreeBudget = BUDGET
    ) -> TokenTree:
        draft = self.finish([self.ask(session_id, base_length, token_ids, budget)])[0]
        assert draft.base_length == base_length + len(token_ids)
        return draft.tree

    def close(self, session_id: int) -> None:
        self.drafter.accept(CloseTask(session_id))

    def state(self, session_id: int) -> ModelState:
        """What the draft model holds of a session."""
        state = self.drafter._sessions[session_id].model
        assert state is not None
        return state

    def kv(self, session_id: int, num_tokens: int) -> torch.Tensor:
        """Keys and values of the first `num_tokens` positions, [L * H, num_tokens, D + D]."""
        slots = self.state(session_id).slots
        assert slots.num_cached == num_tokens
        return cached(self.memory.pool, slots.by_position[:num_tokens])


def build_core(
    folder: Path,
    prefill_chunk: int = 256,
    num_kv_slots: int = 4096,
    *,
    share_prefixes: bool = True,
    gate: ExitGate | None = None,
    max_batch_rows: int = 512,
    executor: Literal["auto", "reference"] = "auto",
    num_guesses: int = 0,
) -> CoreDriver:
    settings = DrafterSettings(
        model=str(folder),
        num_threads=1,
        num_kv_slots=num_kv_slots,
        share_prefixes=share_prefixes,
        executor=executor,
    )
    loaded = load_model(settings)
    early_exits = EarlyExits(loaded.decoder, loaded.memory.pool, gate or ExitGate(), max_batch_rows)
    model = ModelDrafting(
        loaded.decoder,
        loaded.memory,
        prefill_chunk,
        MAX_TREE_NODES,
        early_exits=early_exits,
        max_batch_rows=max_batch_rows,
        always_deepens=True,
    )
    plan = paper_plan(loaded.decoder.config.num_layers, 4, MlpPlacement.STAGED)
    config = loaded.decoder.config
    limits = DrafterLimits(
        "draft", config.vocab_size, loaded.info.max_model_len, MAX_TREE_NODES, plan, early_exits=config.early_exits
    )
    ahead = AheadDrafting(model, num_guesses) if num_guesses else None
    drafter = Drafter(limits, Rounds(asks_all_sources=True), model=model, ahead=ahead)
    return CoreDriver(drafter, model, early_exits, loaded.memory)


def deepest_path(tree: TokenTree) -> tuple[int, ...]:
    """Tokens from the first level down to a deepest node."""
    row = max(range(len(tree) + 1), key=lambda row: tree.row_depths[row])
    return tuple(tree.token_ids[above - 1] for above in tree.path_rows(row))
