"""The base's own text, with the hidden states it had while writing it.

Dimensions: B rows, T tokens, H hidden size, V vocabulary, S cached tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

from models.recipe.copying import Stream
from models.recipe.settings import OwnTextSettings


@dataclass(frozen=True)
class OwnText:
    """Token ids [B, T + 1] and the base's final hidden states [B, T, H] that predict ids 1..T."""

    token_ids: Tensor
    hidden: Tensor


class PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's KV cache written in place; growing by concatenation copied it every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._num_cached = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate room for `capacity` tokens in the shape of the first states."""
        batch, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self._capacity, head_dim)
        self.values = self.keys.clone()
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states [B, heads, new, D]; return views of everything cached."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._num_cached + key_states.shape[-2]
        self.keys[:, :, self._num_cached : end] = key_states
        self.values[:, :, self._num_cached : end] = value_states
        self._num_cached = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self._num_cached


@torch.inference_mode()
def continue_text(
    model: LlamaForCausalLM, prompts: Tensor, new_tokens: int, temperatures: Tensor, seed: int
) -> OwnText:
    """Continue prompts [B, T] by exactly `new_tokens`, past separators. A temperature of 0 means greedy; others sample.
    `temperatures` is [B]. Deterministic in (model, arguments) on one machine."""
    noise = torch.Generator(device=prompts.device).manual_seed(seed)
    capacity = prompts.shape[1] + new_tokens
    cache = Cache(layers=[PreallocatedLayer(capacity) for _ in model.model.layers])
    token_ids, fresh, states = [prompts], prompts, []
    for _ in range(new_tokens):
        hidden = model.model(input_ids=fresh, past_key_values=cache, use_cache=True).last_hidden_state
        states.append(hidden)
        logits = model.lm_head(hidden[:, -1])  # [B, V]
        exponential = torch.empty_like(logits).exponential_(generator=noise)  # the Gumbel-max rule
        fresh = (logits - temperatures[:, None] * exponential.log()).argmax(dim=-1, keepdim=True)  # [B, 1]
        token_ids.append(fresh)
    return OwnText(torch.cat(token_ids, dim=1), torch.cat(states, dim=1))


def write_own_text(model: LlamaForCausalLM, stream: Stream, settings: OwnTextSettings, folder: Path) -> OwnText:
    """Return the configured batches of own text, one file per batch in `folder` for resuming."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = []
    for index in range(settings.num_batches):
        path = folder / f"own-{index}.pt"
        if not path.exists():
            temperatures = torch.full((settings.batch_size,), settings.temperature)
            temperatures[: int(settings.batch_size * settings.greedy_share)] = 0.0
            seed = settings.seed * 1_000 + index
            prompts = prompts_of(stream, settings.batch_size, settings.prompt_tokens, seed).to(model.device)
            text = continue_text(model, prompts, settings.new_tokens, temperatures.to(model.device), seed)
            torch.save((text.token_ids, text.hidden), path)
        batches.append(torch.load(path, map_location="cpu"))
    return OwnText(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


def prompts_of(stream: Stream, num_prompts: int, num_tokens: int, seed: int) -> Tensor:
    """Return windows [B, T] from seeded places of a stream."""
    choose = random.Random(seed)
    starts = [choose.randrange(len(stream) - num_tokens) for _ in range(num_prompts)]
    return torch.tensor([stream[start : start + num_tokens].tolist() for start in starts])
