"""The engine of a drafter with a draft model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import structlog
import torch

from drafter_service.config import DrafterSettings
from drafter_service.drafter import Drafter
from drafter_service.early_exit.exits import EarlyExits
from drafter_service.early_exit.gate import ExitGate
from drafter_service.fusion.rounds import Rounds
from drafter_service.model.ahead import AheadDrafting
from drafter_service.model.drafting import ModelDrafting
from drafter_service.model.plan_choice import candidate_plans, fastest_plan, settle_threads, time_plans
from drafter_service.model.vocabulary_bridge import VocabularyBridge
from drafter_service.request import DrafterLimits
from drafter_service.session import DraftTask, OpenTask
from drafter_service.shell import DrafterShell, open_text_resources
from easyspec.checkpoint.location import TOKENIZER_PATTERNS, model_path
from easyspec.engine.shell import CloseTask
from easyspec.errors import ConfigurationError, InvalidRequestError
from easyspec.model.loading import LoadedModel, load_model
from easyspec.parallel.layer_groups import LayerPlan, paper_plan, parse_plan
from easyspec.parallel.rank_placement import RankPlacement
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.messages import Calibration, OpenSpeculation
from easyspec.speculation.parameters import LayerPlanRequest, MlpPlacement, SamplingParameters, TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint, tokens_by_id

# The length that a session comes to when kernels are warmed up.
_WARM_UP_TOKENS = 3
_SIZE_ON_RANKS = 4


class DrafterEngine(DrafterShell):
    """Loads the draft model on its own thread."""

    _grammars: GrammarCompiler | None = None

    async def stop(self) -> None:
        await super().stop()
        if self._grammars is not None:
            self._grammars.close()

    def _build(self) -> Drafter:
        settings = self._settings
        loaded = load_model(settings, placement=RankPlacement(settings.rank_placement), is_auto_8bit=True)
        self._tokenizer, bridge = _tokenizer_and_bridge(settings, loaded)
        fingerprint = tokenizer_fingerprint(self._tokenizer)
        self._info = replace(loaded.info, tokenizer_fingerprint=fingerprint)
        self._thread.when_idle = loaded.decoder.keep_followers
        self._thread.when_stopped = loaded.dismiss_followers
        plan = _default_plan(settings, loaded)
        self.layer_groups = str(plan)
        self.layer_plan = LayerPlanRequest(max(len(group) for group in plan.groups), plan.mlp, calibration=True)
        model = ModelDrafting(
            loaded.decoder,
            loaded.memory,
            settings.prefill_chunk,
            settings.max_tree_nodes,
            settings.max_prefill_slowdown,
            early_exits=EarlyExits(loaded.decoder, loaded.memory.pool, ExitGate(), settings.max_batch_rows),
            max_batch_rows=settings.max_batch_rows,
            bridge=bridge,
            always_deepens=settings.ask == "always",
        )
        rounds = Rounds(asks_all_sources=settings.ask == "always")
        resources = open_text_resources(settings, fingerprint)
        no_exits_because = ""
        if not loaded.decoder.config.early_exits:
            no_exits_because = f"the draft model in {loaded.folder} has no exit_layers in its config.json"
        elif not loaded.decoder.can_slice:
            no_exits_because = "early_exit needs a draft model on one rank"
        if DraftSources.EARLY_EXIT in settings.draft_sources and no_exits_because:
            raise ConfigurationError(f"sources is {settings.sources!r}, but {no_exits_because}")
        limits = DrafterLimits(
            settings.served_model_name,
            loaded.info.vocab_size if bridge is None else bridge.num_ids,
            loaded.info.max_model_len,
            settings.max_tree_nodes,
            plan,
            settings.draft_sources,
            () if no_exits_because else loaded.decoder.config.early_exits,
            no_exits_because,
        )
        self._grammars = GrammarCompiler(self._tokenizer, loaded.info.vocab_size, loaded.info.eos_token_ids)
        self._grammars.prepare()
        ahead = AheadDrafting(model, settings.draft_ahead) if settings.draft_ahead else None
        drafter = Drafter(limits, rounds, resources, model, ahead, self._grammars, self._on_step)
        _warm_up(drafter, settings.max_tree_nodes)
        return drafter


def follow(settings: DrafterSettings) -> None:
    """What a rank other than 0 does, from loading until rank 0 dismisses it; raises EngineLostError."""
    loaded = load_model(settings, placement=RankPlacement(settings.rank_placement), is_auto_8bit=True)
    with torch.inference_mode():
        loaded.follow()


def _tokenizer_and_bridge(settings: DrafterSettings, loaded: LoadedModel) -> tuple[Path, VocabularyBridge | None]:
    """Whose tokenizer gives token ids their meaning, and what lies between it and the draft model's own."""
    if settings.tokenizer is None:
        return loaded.folder, None
    tokenizer = model_path(str(settings.tokenizer), TOKENIZER_PATTERNS)
    if tokenizer_fingerprint(tokenizer) == loaded.info.tokenizer_fingerprint:
        return tokenizer, None
    num_rows = loaded.decoder.config.vocab_size
    return tokenizer, VocabularyBridge(tokens_by_id(tokenizer), tokens_by_id(loaded.folder), num_rows)


def _default_plan(settings: DrafterSettings, loaded: LoadedModel) -> LayerPlan:
    """The plan of the settings, or the fastest; raises ConfigurationError if it does not fit the draft model."""
    mlp, num_layers = MlpPlacement(settings.mlp), loaded.decoder.config.num_layers
    try:
        if settings.layer_groups is not None:
            return parse_plan(settings.layer_groups, num_layers, mlp)
        if settings.layer_parallel_size is not None or not loaded.decoder.can_slice:
            size = settings.layer_parallel_size or _SIZE_ON_RANKS
            return paper_plan(num_layers, min(size, num_layers), mlp)
    except InvalidRequestError as error:
        raise ConfigurationError(str(error)) from error
    with torch.inference_mode():
        settle_threads(loaded.decoder, loaded.memory)
        plans = candidate_plans(num_layers, mlp)
        step_ms = time_plans(loaded.decoder, loaded.memory, plans)
    plan = fastest_plan(plans, step_ms)
    structlog.get_logger().info(
        "layer_plan_chosen",
        layer_groups=str(plan),
        step_ms={str(each): round(each_ms, 3) for each, each_ms in zip(plans, step_ms, strict=True)},
        num_threads=loaded.decoder.executor.num_threads,
    )
    return plan


def _warm_up(drafter: Drafter, max_tree_nodes: int) -> None:
    """Draft twice for a one-token prompt, so that kernels are chosen before the first request."""
    width = max(1, min(4, max_tree_nodes // 2))
    budget = TreeBudget(min(3, max_tree_nodes), width, min(8, max_tree_nodes))
    opening = OpenTask(
        OpenSpeculation((0,), SamplingParameters(seed=0), max_total_length=_WARM_UP_TOKENS, sources=DraftSources.MODEL)
    )
    drafter.accept(opening)
    session_id = opening.future.result()
    for base_length in range(1, min(_WARM_UP_TOKENS, drafter.max_model_len)):
        task = DraftTask(session_id, Calibration(base_length, (0,), budget))
        drafter.accept(task)
        while not task.future.done():
            drafter.step()
        task.future.result()
    drafter.accept(CloseTask(session_id))
