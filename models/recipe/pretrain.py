"""Pre-training of the base: next-token cross entropy on the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from models.recipe.llama import build_llama, compile_layers, save_pair_member
from models.recipe.settings import RecipeSettings
from models.recipe.tokens import WindowSampler, ensure_tokenizer, micro_batches
from models.recipe.trainer import Effort, Trainer


def pretrain(settings: RecipeSettings) -> tuple[LlamaForCausalLM, Effort]:
    """Train the base from scratch, or resume it; returns it in float32 on `settings.device`.

    Writes checkpoints, `base.log` and the interim `base-latest/` below `settings.work`.
    """
    tokenizer = ensure_tokenizer(settings)
    model = build_llama(settings.base_shape, settings.base_optim.seed).to(settings.device)
    compile_layers(model)
    sampler = WindowSampler(settings, settings.base_optim)

    def publish(folder: Path) -> None:
        save_pair_member(model, tokenizer, folder)

    trainer = Trainer("base", model, settings.base_optim, settings, publish)
    effort = trainer.run(lambda step, progress: _losses(model, sampler.batch(step, progress), settings))
    return model, effort


def _losses(model: LlamaForCausalLM, windows: Tensor, settings: RecipeSettings) -> Iterator[Tensor]:
    for part, share in micro_batches(windows, settings.base_optim):
        yield next_token_loss(model, part.to(settings.device)) * share


def next_token_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Return the mean cross entropy in nats of windows [B, T + 1]."""
    hidden = model.model(input_ids=windows[:, :-1], use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden)  # [B, T, V]
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
