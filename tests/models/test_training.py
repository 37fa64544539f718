"""The training loop on a model small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from models.recipe.distil import DistilBatches, exit_hidden, inherit_embedding, mean_exit_loss
from models.recipe.evaluate import repeated_share, text_figures
from models.recipe.llama import build_llama
from models.recipe.optim import lr_factor, orthogonalise, schedule_progress
from models.recipe.own_text import OwnText, continue_text
from models.recipe.settings import (
    BASE_SHAPE,
    DRAFT_SHAPE,
    DistilSettings,
    ModelShape,
    OptimSettings,
    RecipeSettings,
)
from models.recipe.tokens import WindowSampler, window_tokens
from models.recipe.trainer import Trainer

_SHAPE = ModelShape(
    hidden_size=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=24,
    vocab_size=40,
    max_positions=64,
)
_BASE = replace(_SHAPE, hidden_size=32, mlp_size=48)
_OPTIM = OptimSettings(
    num_steps=12,
    tokens_per_step=64,
    micro_batch_tokens=32,
    short_tokens=16,
    long_tokens=16,
    num_warmup_steps=2,
    matrix_lr=2e-2,
    vector_lr=2e-2,
)
_EXITS = (1, 2, 3)


@pytest.fixture
def settings(tmp_path: Path) -> RecipeSettings:
    """Settings whose corpus is a cached stream of a repeating pattern."""
    np.save(tmp_path / "pass-0.npy", (np.arange(4_000) ** 2 // 7 % 37).astype(np.uint16))
    distil = DistilSettings(optim=_OPTIM, exit_layers=_EXITS)
    return RecipeSettings(work=tmp_path, base_optim=_OPTIM, copying=None, distil=distil)


def _own_text(base: LlamaForCausalLM) -> OwnText:
    prompts = torch.arange(8 * 4).reshape(8, 4) % 40
    return continue_text(base, prompts, 13, torch.zeros(8), seed=1)


def test_every_exit_learns_and_a_resumed_run_ends_alike(settings: RecipeSettings) -> None:
    base = build_llama(_BASE, 1).eval()
    with torch.no_grad():
        base.lm_head.weight.mul_(40)
    batches = DistilBatches(settings, base, _own_text(base))

    def train(num_steps: int) -> LlamaForCausalLM:
        draft = build_llama(_SHAPE, 2)
        trainer = Trainer("draft", draft, replace(_OPTIM, num_steps=num_steps), settings, print)
        trainer.run(lambda step, _: iter(_losses(draft, base, batches, step)))
        return draft

    before = _exit_losses(build_llama(_SHAPE, 2), base, batches)
    resumed = train(12)
    after = _exit_losses(resumed, base, batches)
    assert all(late < 0.9 * early for early, late in zip(before, after, strict=True))
    weights = train(12).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in resumed.state_dict().items())


def _losses(draft: LlamaForCausalLM, base: LlamaForCausalLM, batches: DistilBatches, step: int) -> list[torch.Tensor]:
    return [_loss(draft, base, batch, _EXITS) / 2 for batch in batches.of_step(step)]


def _exit_losses(draft: LlamaForCausalLM, base: LlamaForCausalLM, batches: DistilBatches) -> list[float]:
    batch = next(batches.of_step(0))
    return [_loss(draft, base, batch, (layer,)).item() for layer in _EXITS]


def _loss(draft: LlamaForCausalLM, base: LlamaForCausalLM, batch: OwnText, exits: tuple[int, ...]) -> torch.Tensor:
    states = exit_hidden(draft, batch.token_ids[:, :-1], exits)
    with torch.no_grad():
        base_logits = base.lm_head(batch.hidden.flatten(0, 1))
    return mean_exit_loss([s.flatten(0, 1) for s in states], draft.lm_head.weight, base_logits)


def test_last_exit_is_the_model_itself() -> None:
    model = build_llama(_SHAPE, 3).eval()
    tokens = torch.arange(20).reshape(2, 10)
    with torch.inference_mode():
        exits = exit_hidden(model, tokens, (3,))
        torch.testing.assert_close(model.lm_head(exits[0]), model(input_ids=tokens).logits)


def test_own_text_is_greedy_decoding_with_the_states_of_a_plain_pass() -> None:
    model = build_llama(_BASE, 4).eval()
    own = _own_text(model)
    with torch.inference_mode():
        out = model.model(input_ids=own.token_ids[:, :-1]).last_hidden_state
        chosen = model.lm_head(out).argmax(-1)
    torch.testing.assert_close(own.hidden, out, atol=1e-4, rtol=1e-4)
    assert torch.equal(chosen[:, 3:], own.token_ids[:, 4:])


def test_a_model_agrees_with_itself() -> None:
    model = build_llama(_SHAPE, 5).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(8)
    windows = torch.arange(3 * 11).reshape(3, 11) % 40
    figures = text_figures(model, model, (2, 3), windows, 4)
    last = figures.exits["3"]
    assert figures.num_tokens == 3 * 6
    assert last.loss == pytest.approx(figures.base_loss, abs=1e-3)
    assert (last.divergence, last.top1_agreement) == (pytest.approx(0, abs=1e-4), 1.0)
    assert last.overlap == pytest.approx(1, abs=1e-4)
    assert figures.exits["2"].divergence > last.divergence


def test_repeated_share_counts_loops_only() -> None:
    assert repeated_share([list(range(40))]) == 0
    assert repeated_share([[1, 2] * 20]) == pytest.approx(31 / 33, abs=1e-4)


def test_windows_depend_on_the_step_alone_and_do_not_repeat(settings: RecipeSettings) -> None:
    sampler = WindowSampler(settings, _OPTIM)
    batches = [sampler.batch(step, 0.0) for step in range(12)]
    assert torch.equal(WindowSampler(settings, _OPTIM).batch(7, 0.0), batches[7])
    assert batches[0].shape == (4, 17)
    rows = {tuple(row.tolist()) for batch in batches for row in batch}
    assert len(rows) == 12 * 4


def test_curriculum_and_schedule_at_their_ends() -> None:
    optim = OptimSettings(num_steps=100, num_warmup_steps=10, decay_share=0.5, long_share=0.3)
    assert [window_tokens(progress, optim) for progress in (0, 0.69, 0.7, 1)] == [256, 256, 512, 512]
    assert lr_factor(0, 0.0, optim) == pytest.approx(0.1)
    assert lr_factor(50, 0.5, optim) == 1.0
    assert lr_factor(99, 0.99, optim) == pytest.approx(0.02)


def test_a_time_budget_ends_a_slow_run_and_leaves_a_fast_one_alone() -> None:
    steps_only = OptimSettings(num_steps=100)
    budgeted = OptimSettings(num_steps=100, max_seconds=60.0)
    assert schedule_progress(40, 1e9, steps_only) == 0.4
    assert schedule_progress(40, 6.0, budgeted) == 0.4
    assert schedule_progress(40, 54.0, budgeted) == 0.9


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 8, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_inherited_embedding_keeps_the_angles_of_leading_directions() -> None:
    base, draft = build_llama(_BASE, 1), build_llama(_SHAPE, 2)
    with torch.no_grad():
        base.lm_head.weight[:, 16:] = 0
    inherit_embedding(draft, base)
    gram = base.lm_head.weight @ base.lm_head.weight.t()
    torch.testing.assert_close(draft.lm_head.weight @ draft.lm_head.weight.t(), gram)


def test_the_shapes_make_a_pair() -> None:
    base, draft = (build_llama(shape, 0).num_parameters() for shape in (BASE_SHAPE, DRAFT_SHAPE))
    assert base >= 8 * draft
    assert DRAFT_SHAPE.num_layers >= 8
