"""Distillation of the draft from the base, every exit learning the base's distribution.

Dimensions: B rows, T tokens, H hidden size, V vocabulary, E exits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.recipe.llama import build_llama, compile_layers, save_pair_member
from models.recipe.own_text import OwnText, write_own_text
from models.recipe.settings import RecipeSettings
from models.recipe.tokens import WindowSampler, ensure_tokenizer, pass_stream
from models.recipe.trainer import Effort, Trainer


def distil(settings: RecipeSettings, base: LlamaForCausalLM) -> tuple[LlamaForCausalLM, Effort]:
    """Train the draft from scratch, or resume it; returns it in float32.

    The loss is the plain mean over the exits of KL(base || draft) at temperature 1, each exit
    read through the shared final norm and LM head. Writes below `settings.work`.
    """
    tokenizer = ensure_tokenizer(settings)
    stream = pass_stream(settings, 0)
    own = write_own_text(base, stream, settings.distil.own_text, settings.work / "own")
    draft = build_llama(settings.draft_shape, settings.distil.optim.seed)
    inherit_embedding(draft, base)
    draft.to(settings.device)
    return draft, learn("draft", draft, base, own, tokenizer, settings)


def learn(
    name: str,
    draft: LlamaForCausalLM,
    base: LlamaForCausalLM,
    own: OwnText,
    tokenizer: PreTrainedTokenizerFast,
    settings: RecipeSettings,
) -> Effort:
    """Train `draft` in place on what `base` says, as `settings.distil` has it, and compile both."""
    compile_layers(draft)
    compile_layers(base)
    batches, optim = DistilBatches(settings, base, own), settings.distil.optim
    exit_loss = torch.compile(mean_exit_loss, dynamic=False)

    def losses(step: int, progress: float) -> Iterator[Tensor]:
        for batch in batches.of_step(step):
            share = batch.hidden.shape[:2].numel() / optim.tokens_per_step
            exits = exit_hidden(draft, batch.token_ids[:, :-1], settings.distil.exit_layers)
            with torch.no_grad():
                base_logits = base.lm_head(batch.hidden.flatten(0, 1))  # [B * T, V]
            yield exit_loss([hidden.flatten(0, 1) for hidden in exits], draft.lm_head.weight, base_logits) * share

    return Trainer(name, draft, optim, settings, partial(save_pair_member, draft, tokenizer)).run(losses)


class DistilBatches:
    """Micro-batches of own text, whose base states are known, and of corpus, whose are not."""

    def __init__(self, settings: RecipeSettings, base: LlamaForCausalLM, own: OwnText) -> None:
        optim = settings.distil.optim
        self._own = own
        self._base = base
        self._device = settings.device
        self._rows = max(1, optim.micro_batch_tokens // optim.long_tokens)
        num_parts = optim.tokens_per_step // (self._rows * optim.long_tokens)
        self._own_parts = round(num_parts * settings.distil.own_share)
        self._corpus_parts = num_parts - self._own_parts
        corpus_tokens = max(1, self._corpus_parts) * self._rows * optim.long_tokens
        self._sampler = WindowSampler(settings, replace(optim, tokens_per_step=corpus_tokens))
        self._seed = optim.seed

    def of_step(self, step: int) -> Iterator[OwnText]:
        """Yield the step's micro-batches on the device; depends on the step alone."""
        for part in range(self._own_parts):
            index = step * self._own_parts + part
            parts_per_epoch = len(self._own.token_ids) // self._rows
            order = list(range(len(self._own.token_ids)))
            random.Random(f"{self._seed}:{index // parts_per_epoch}").shuffle(order)
            start = index % parts_per_epoch * self._rows
            rows = order[start : start + self._rows]
            token_ids = self._own.token_ids[rows].to(self._device)
            yield OwnText(token_ids, self._own.hidden[rows].to(self._device))
        if self._corpus_parts:
            for windows in self._sampler.batch(step, 1.0).split(self._rows):
                token_ids = windows.to(self._device)
                yield OwnText(token_ids, base_hidden(self._base, token_ids[:, :-1]))


@torch.no_grad()
def base_hidden(base: LlamaForCausalLM, token_ids: Tensor) -> Tensor:
    """Return the base's normalised final hidden states [B, T, H]."""
    hidden: Tensor = base.model(input_ids=token_ids, use_cache=False).last_hidden_state
    return hidden


def exit_hidden(model: LlamaForCausalLM, token_ids: Tensor, exit_layers: tuple[int, ...]) -> list[Tensor]:
    """Return for each exit the normalised hidden states [B, T, H] after that many layers."""
    states = layer_states(model, range(len(model.model.layers)), model.model.embed_tokens(token_ids))
    return [model.model.norm(states[depth]) for depth in exit_layers]


def layer_states(model: LlamaForCausalLM, layers: Sequence[int], hidden: Tensor) -> list[Tensor]:
    """Return `hidden` [B, T, H], then the state after each of `layers`."""
    position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
    position_embeddings = model.model.rotary_emb(hidden, position_ids=position_ids)
    states = [hidden]
    for layer in layers:
        run = model.model.layers[layer]
        states.append(run(states[-1], position_embeddings=position_embeddings, position_ids=position_ids))
    return states


def mean_exit_loss(exits: list[Tensor], head: Tensor, base_logits: Tensor) -> Tensor:
    """Return the mean over exits of KL(base || draft) in nats. `exits` are [rows, H], `head` [V, H], `base_logits`
    [rows, V]."""
    base_logprobs = log_softmax(base_logits, dim=-1)
    base_probs = base_logprobs.exp()
    divergences = [
        (base_probs * (base_logprobs - log_softmax(hidden @ head.t(), dim=-1))).sum(-1).mean() for hidden in exits
    ]
    return torch.stack(divergences).mean()


def inherit_embedding(draft: LlamaForCausalLM, base: LlamaForCausalLM) -> None:
    """Start the draft's tied embedding from the base's leading principal directions."""
    embedding = base.lm_head.weight.detach().float().cpu()  # [V, H]
    _, _, directions = torch.linalg.svd(embedding, full_matrices=False)
    with torch.no_grad():
        draft.lm_head.weight.copy_(embedding @ directions[: draft.config.hidden_size].t())
