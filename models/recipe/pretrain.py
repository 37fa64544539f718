"""Pre-training of the base: next-token cross entropy on the corpus, then on the corpus and exercises in copying."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from models.recipe.llama import build_llama, compile_layers, save_pair_member
from models.recipe.settings import OptimSettings, RecipeSettings
from models.recipe.tokens import WindowSampler, ensure_tokenizer
from models.recipe.trainer import Effort, Trainer


def pretrain(settings: RecipeSettings) -> tuple[LlamaForCausalLM, Effort]:
    """Train the base from scratch on the corpus alone, or resume it; returns it in float32 on `settings.device`. Writes
    checkpoints, `base.log` and the interim `base-latest/` below `settings.work`."""
    model = build_llama(settings.base_shape, settings.base_optim.seed)
    return model, _train("base", model, settings.base_optim, replace(settings, copying=None))


def teach_copying(settings: RecipeSettings, base: LlamaForCausalLM) -> Effort:
    """Train the pre-trained base on, in place, on the corpus and exercises in copying. Writes checkpoints,
    `copying.log` and the interim `copying-latest/` below `settings.work`."""
    return _train("copying", base, settings.copying_optim, settings)


def _train(name: str, model: LlamaForCausalLM, optim: OptimSettings, settings: RecipeSettings) -> Effort:
    tokenizer = ensure_tokenizer(settings)
    model.to(settings.device)
    compile_layers(model)
    sampler = WindowSampler(settings, optim)

    def losses(step: int, progress: float) -> Iterator[Tensor]:
        windows = sampler.batch(step, progress)  # [B, T + 1]
        num_rows = max(1, optim.micro_batch_tokens // (windows.shape[1] - 1))  # as many at once as stay near the caches
        for part in windows.split(num_rows):
            token_ids = part.to(settings.device)
            logits = model.lm_head(model.model(input_ids=token_ids[:, :-1], use_cache=False).last_hidden_state)
            loss = cross_entropy(logits.flatten(0, 1), token_ids[:, 1:].flatten())
            yield loss * (len(part) / len(windows))

    return Trainer(name, model, optim, settings, partial(save_pair_member, model, tokenizer)).run(losses)
