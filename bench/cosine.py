"""How far a fuzzy step strays: the paper's cosine table for a draft model (arXiv 2502.02493).

Written against transformers' Llama modules, apart from `easyspec.model`, so that it checks the same claim by other
means. Dimensions: T positions, H query heads, G key/value heads, D head size, C hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, softmax

from easyspec.speculation.parameters import MlpPlacement


@dataclass(frozen=True)
class LayerStates:
    """What one layer's attention read, computed and returned."""

    h: Tensor  # [T, C] the hidden state attention reads, before the input norm
    q: Tensor  # [T, H, D] after rotation
    k: Tensor  # [T, G, D] after rotation
    v: Tensor  # [T, G, D]
    attention_output: Tensor  # [T, C] after the output projection


@dataclass(frozen=True)
class CosineRow:
    """Mean cosine of exact and fuzzy states over layers and positions; each vector is a row's whole state."""

    layer_parallel_size: int
    mlp: str
    h: float
    q: float
    k: float
    v: float
    attention_output: float


class TeacherForcedSteps:
    """For every position of a text: one step there, with an exact context before it.

    `model` is a transformers LlamaForCausalLM in float32 on the CPU; `token_ids` is `[T]`.
    """

    def __init__(self, model: Any, token_ids: Tensor) -> None:
        self._layers = list(model.model.layers)
        self._embeddings: Tensor = model.model.embed_tokens(token_ids)  # [T, C]
        positions = torch.arange(len(token_ids))[None]
        cos, sin = model.model.rotary_emb(self._embeddings[None], positions)
        self._cos: Tensor = cos[0, :, None, :]  # [T, 1, D]
        self._sin: Tensor = sin[0, :, None, :]  # [T, 1, D]
        self.exact = self._run_exact()

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def _run_exact(self) -> list[LayerStates]:
        hidden = self._embeddings
        states = []
        for layer in range(self.num_layers):
            state = self._attention(layer, hidden, context=None)
            states.append(state)
            hidden = hidden + state.attention_output
            hidden = hidden + self._mlp(layer, hidden)
        self.last_hidden = hidden
        return states

    def fuzzy(self, groups: Sequence[range], mlp: MlpPlacement) -> list[LayerStates]:
        """A fuzzy step at every position: in a group each attention reads the state at the group's entrance.

        MLPs run in order on the running residual (the paper), or each on the cumulative attention of its place and
        all at once (staged).
        """
        hidden = self._embeddings
        states: list[LayerStates] = []
        for group in groups:
            entrance = hidden
            group_states = [self._attention(layer, entrance, context=self.exact[layer]) for layer in group]
            states += group_states
            if mlp is MlpPlacement.SEQUENTIAL:
                for layer, state in zip(group, group_states, strict=True):
                    hidden = hidden + state.attention_output
                    hidden = hidden + self._mlp(layer, hidden)
                continue
            attended = entrance
            mlp_sum = torch.zeros_like(entrance)
            for layer, state in zip(group, group_states, strict=True):
                attended = attended + state.attention_output
                mlp_sum = mlp_sum + self._mlp(layer, attended)
            hidden = attended + mlp_sum
        return states

    def _mlp(self, layer: int, hidden: Tensor) -> Tensor:
        block = self._layers[layer]
        result: Tensor = block.mlp(block.post_attention_layernorm(hidden))
        return result

    def _attention(self, layer: int, hidden: Tensor, context: LayerStates | None) -> LayerStates:
        """Attention of every position; earlier keys and values come from `context`, or from `hidden` itself."""
        attention = self._layers[layer].self_attn
        normed = self._layers[layer].input_layernorm(hidden)
        q = self._rotate(attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim)))  # [T, H, D]
        k = self._rotate(attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim)))  # [T, G, D]
        v = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim))  # [T, G, D]
        earlier_k, earlier_v = (k, v) if context is None else (context.k, context.v)
        heads = _attend(q, k, v, earlier_k, earlier_v)  # [T, H, D]
        output: Tensor = attention.o_proj(heads.flatten(1))  # [T, C]
        return LayerStates(hidden, q, k, v, output)

    def _rotate(self, heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * self._cos + torch.cat((-second, first), dim=-1) * self._sin


def _attend(q: Tensor, k: Tensor, v: Tensor, earlier_k: Tensor, earlier_v: Tensor) -> Tensor:
    """Causal attention whose own position sees `k`, `v` and whose earlier ones are `earlier_k`, `earlier_v`."""
    num_positions, num_heads, head_size = q.shape
    repeats = num_heads // k.shape[1]
    k, v, earlier_k, earlier_v = (x.repeat_interleave(repeats, dim=1) for x in (k, v, earlier_k, earlier_v))
    scores = torch.einsum("thd,shd->hts", q, earlier_k) / math.sqrt(head_size)  # [H, T, T]
    own_scores = (q * k).sum(-1).T / math.sqrt(head_size)  # [H, T]
    is_own = torch.eye(num_positions, dtype=torch.bool)
    is_earlier = torch.ones(num_positions, num_positions).tril(-1).bool()
    scores = torch.where(is_own, own_scores[:, :, None], scores.masked_fill(~is_earlier, -math.inf))
    weights = softmax(scores, dim=-1)  # [H, T, T]
    own_weights = weights.diagonal(dim1=1, dim2=2)  # [H, T]
    earlier = torch.einsum("hts,shd->thd", weights.masked_fill(is_own, 0.0), earlier_v)
    return earlier + own_weights.T[:, :, None] * v  # [T, H, D]


def paper_groups(num_layers: int, layer_parallel_size: int) -> list[range]:
    """First and last layer alone, then 1..N-1, N..2N-1, ...; what is left before the last layer is a smaller group."""
    groups = [range(1)]
    while groups[-1].stop < num_layers - 1:
        start = groups[-1].stop
        stop = (start // layer_parallel_size + 1) * layer_parallel_size
        groups.append(range(start, min(stop, num_layers - 1)))
    return [*groups, range(num_layers - 1, num_layers)]


def cosine_table(
    checkpoint: Path, texts: Sequence[str], layer_parallel_sizes: Sequence[int], num_positions: int
) -> list[CosineRow]:
    """Compare exact and fuzzy steps at the last `num_positions` positions of every text."""
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    token_ids = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    return compare_steps(model, token_ids, layer_parallel_sizes, num_positions)


@torch.inference_mode()
def compare_steps(
    model: Any, texts: Sequence[Tensor], layer_parallel_sizes: Sequence[int], num_positions: int
) -> list[CosineRow]:
    """As `cosine_table`, for a loaded model and tokenized texts, each `[T]`."""
    steps = [TeacherForcedSteps(model, token_ids) for token_ids in texts]
    rows = []
    for size in layer_parallel_sizes:
        for mlp in MlpPlacement:
            groups = paper_groups(steps[0].num_layers, size)
            pairs = [pair for step in steps for pair in zip(step.exact, step.fuzzy(groups, mlp), strict=True)]
            cosines = [torch.cat(list(_cosines(pairs, name, num_positions))).mean().item() for name in _STATES]
            rows.append(CosineRow(size, mlp.value, *cosines))
    return rows


_STATES = ("h", "q", "k", "v", "attention_output")


def _cosines(pairs: Sequence[tuple[LayerStates, LayerStates]], name: str, num_positions: int) -> Iterator[Tensor]:
    for exact, fuzzy in pairs:
        one, other = (getattr(state, name)[-num_positions:].flatten(1) for state in (exact, fuzzy))
        yield cosine_similarity(one, other, dim=-1)  # [num_positions]
