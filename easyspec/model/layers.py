"""Decoder layers in groups whose attention runs at the same time.

Dimensions: `T` rows of the pass, `N` layers in the group, `H` KV heads, `G` query heads per KV head, `D` head size,
`E` hidden size, `F` MLP size; of an attention group of the layout: `B` segments, `M` padded rows, `X` blocks of `W`
columns.

One code path serves the ordinary decoder (every group has one layer) and EasySpec's fuzzy steps (arXiv
2502.02493, algorithm 2): inside a group every attention reads the hidden state at the group's entrance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from easyspec.model.attention import AttentionFunction
from easyspec.model.config import ModelConfig
from easyspec.model.kv_cache import KVPool
from easyspec.model.linear import Linear
from easyspec.model.rope import interleave_heads, rotate
from easyspec.model.row_layout import AttentionGroup, RowLayout
from easyspec.model.weights import TensorSource
from easyspec.parallel.ranks import SINGLE_RANK, Ranks
from easyspec.parallel.shard import WHOLE, Shard
from easyspec.speculation.parameters import MlpPlacement


@dataclass(frozen=True)
class PassState:
    """What all layers of a pass share: layout, rotation and table rows of the KV pool.

    rotation: [T, 1, H * G + 2 * H, D / 2], which is 1 for values, so that one product turns the whole projection.

    read_entries: [L * H, X * W] of each attention group; write_entries: [L * H, T].
    """

    layout: RowLayout
    rotation: torch.Tensor
    pool: KVPool
    read_entries: tuple[torch.Tensor, ...]
    write_entries: torch.Tensor


@dataclass(frozen=True)
class LayerWeights:
    """One layer, its two norm weights folded into the projections behind them.

    qkv: [(H * G + 2 * H) * D, E]: all queries, then key and value of each KV head; queries and keys with their
    dimensions interleaved, queries scaled by 1 / sqrt(D) unless they are normed; output: [E, H * G * D];
    gate_up: [2 * F, E]; down: [E, F].
    """

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None


def load_layer(
    checkpoint: TensorSource, config: ModelConfig, layer: int, device: torch.device, shard: Shard = WHOLE
) -> LayerWeights:
    """Read one layer, or a rank's shard of it; folding is done in float32 and rounded once to the model's type.

    Of the biases that come after a sum over ranks, rank 0 has all and the others none.
    """
    c, prefix = config, f"model.layers.{layer}"
    heads_dim, kv_dim = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    query_rows = _scaled(shard.rows(c.num_heads), c.head_dim)
    kv_rows = _scaled(shard.kv_heads(c.num_kv_heads), c.head_dim)
    mlp_rows = shard.rows(c.intermediate_size)

    def weight(
        name: str, num_rows: int, num_columns: int, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        return checkpoint.tensor(f"{prefix}.{name}.weight", (num_rows, num_columns), rows, columns).float()

    def bias(name: str, num_rows: int, is_there: bool, rows: range | None = None) -> torch.Tensor | None:
        return checkpoint.tensor(f"{prefix}.{name}.bias", (num_rows,), rows).float() if is_there else None

    def norm(name: str, size: int) -> torch.Tensor:
        return checkpoint.tensor(f"{prefix}.{name}.weight", (size,)).float()

    def finish(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=device, dtype=c.dtype).contiguous()

    scale = c.head_dim**-0.5
    q, k, v = (
        weight(f"self_attn.{name}_proj", num_rows, c.hidden_size, rows)
        for name, num_rows, rows in (("q", heads_dim, query_rows), ("k", kv_dim, kv_rows), ("v", kv_dim, kv_rows))
    )
    q_bias, k_bias, v_bias = (
        bias(f"self_attn.{name}_proj", num_rows, c.has_qkv_bias, rows)
        for name, num_rows, rows in (("q", heads_dim, query_rows), ("k", kv_dim, kv_rows), ("v", kv_dim, kv_rows))
    )
    query_scale = 1.0 if c.has_qk_norm else scale
    k = interleave_heads(k, c.head_dim)
    qkv = torch.cat([interleave_heads(q, c.head_dim) * query_scale, _pair_heads(k, v, c.head_dim)])
    qkv = qkv * norm("input_layernorm", c.hidden_size)
    qkv_bias = None
    if q_bias is not None and k_bias is not None and v_bias is not None:
        k_bias = interleave_heads(k_bias, c.head_dim)
        q_bias = interleave_heads(q_bias, c.head_dim) * query_scale
        qkv_bias = torch.cat([q_bias, _pair_heads(k_bias, v_bias, c.head_dim)])
    gate_up = torch.cat(
        [weight(f"mlp.{name}_proj", c.intermediate_size, c.hidden_size, mlp_rows) for name in ("gate", "up")]
    )
    gate_up = gate_up * norm("post_attention_layernorm", c.hidden_size)
    gate_bias, up_bias = (
        bias(f"mlp.{name}_proj", c.intermediate_size, c.has_mlp_bias, mlp_rows) for name in ("gate", "up")
    )
    output_bias = bias("self_attn.o_proj", c.hidden_size, c.has_output_bias and shard.rank == 0)
    down_bias = bias("mlp.down_proj", c.hidden_size, c.has_mlp_bias and shard.rank == 0)
    head_norms: list[torch.Tensor | None] = [None, None]
    if c.has_qk_norm:
        norms = [norm(f"self_attn.{name}_norm", c.head_dim) for name in ("q", "k")]
        norms[0] = norms[0] * scale
        head_norms = [interleave_heads(head_norm, c.head_dim).to(device) for head_norm in norms]
    return LayerWeights(
        qkv=finish(qkv),
        qkv_bias=None if qkv_bias is None else finish(qkv_bias),
        output=finish(weight("self_attn.o_proj", c.hidden_size, heads_dim, columns=query_rows)),
        output_bias=None if output_bias is None else finish(output_bias),
        gate_up=finish(gate_up),
        gate_up_bias=None if gate_bias is None or up_bias is None else finish(torch.cat([gate_bias, up_bias])),
        down=finish(weight("mlp.down_proj", c.hidden_size, c.intermediate_size, columns=mlp_rows)),
        down_bias=None if down_bias is None else finish(down_bias),
        query_norm=head_norms[0],
        key_norm=head_norms[1],
    )


def mlp_shard(config: ModelConfig, weights: LayerWeights, shard: Shard) -> Callable[[torch.Tensor], torch.Tensor]:
    """A rank's part of one layer's MLP, [T, E] -> [T, E], to be summed over ranks; the norm comes first."""
    part = shard.rows(config.intermediate_size)
    both = [*part, *(config.intermediate_size + row for row in part)]
    gate_up_bias = None if weights.gate_up_bias is None else weights.gate_up_bias[both]
    gate_up = Linear(weights.gate_up[both], gate_up_bias)
    down_bias = weights.down_bias if shard.rank == 0 else None
    down = Linear(weights.down[:, part.start : part.stop].contiguous(), down_bias)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up(unit_rms(hidden, config.rms_norm_eps).to(config.dtype)).chunk(2, dim=-1)
        return down(functional.silu(gate) * up)

    return run


def _scaled(part: range, factor: int) -> range:
    return range(part.start * factor, part.stop * factor)


def unit_rms(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """`hidden` divided by its root mean square over the last dimension, in float32; no weight."""
    hidden = hidden.float()
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    mean_square: torch.Tensor = norm.square_().mul_(1.0 / hidden.shape[-1]).add_(eps)
    inverse: torch.Tensor = mean_square.rsqrt_()
    return hidden * inverse


class LayerGroup:
    """N consecutive layers as one wide layer.

    All queries, keys and values of the group come from one product, one attention call serves N x H
    heads, one batched product applies the output projections. MLPs run one after the other on the running
    residual, or (staged) all at once, each on the attention accumulated up to its place.

    With `ranks`, `config` and `weights` are this rank's shard (tensor parallelism): attention and MLP outputs are
    summed over ranks, two collectives a layer, or for a staged group two in all.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        weights: Sequence[LayerWeights],
        mlp: MlpPlacement,
        attention: AttentionFunction,
        ranks: Ranks = SINGLE_RANK,
    ) -> None:
        self._ranks = ranks
        self._config = config
        self._layers = layers
        self._attention = attention
        self._eps = config.rms_norm_eps
        self._qkv = Linear(torch.cat([w.qkv for w in weights]), _cat([w.qkv_bias for w in weights]))
        self._head_norms = _head_norms(config, weights)
        self._is_normed = _is_normed(config, weights[0].qkv.device)
        self._is_staged = mlp is MlpPlacement.STAGED and len(layers) > 1
        if len(layers) == 1:
            self._output = Linear(weights[0].output, weights[0].output_bias)
        else:
            self._outputs = torch.stack([w.output.T for w in weights])  # [N, H * G * D, E]
            self._output_biases = _stack([w.output_bias for w in weights])  # [N, 1, E]
        if self._is_staged:
            self._gate_ups = torch.stack([w.gate_up.T for w in weights])  # [N, E, 2 * F]
            self._gate_up_biases = _stack([w.gate_up_bias for w in weights])
            self._downs = torch.stack([w.down.T for w in weights])  # [N, F, E]
            self._down_biases = _stack([w.down_bias for w in weights])
        else:
            self._mlps = [(Linear(w.gate_up, w.gate_up_bias), Linear(w.down, w.down_bias)) for w in weights]

    @property
    def linears(self) -> list[Linear]:
        """Prepacked products of a single-layer group, for the start-up probe."""
        return [self._qkv, self._output, *(linear for mlp in self._mlps for linear in mlp)]

    def __call__(self, hidden: torch.Tensor, state: PassState) -> torch.Tensor:
        """[T, E] -> [T, E]; writes the group's keys and values of all rows into the pool."""
        outputs = self._ranks.sum(self.attention_outputs(hidden, state))  # [N, T, E]
        if self._is_staged:
            residuals = hidden + outputs.cumsum(dim=0)
            return residuals[-1] + self._ranks.sum(self.staged_mlp_outputs(residuals).sum(dim=0))
        for layer, output in enumerate(outputs):
            hidden = hidden + output
            hidden = hidden + self._ranks.sum(self.mlp_output(layer, hidden))
        return hidden

    def attention_outputs(self, hidden: torch.Tensor, state: PassState) -> torch.Tensor:
        """A_i of every layer on the same hidden state, [T, E] -> [N, T, E]; writes keys and values."""
        attended = self._attend(hidden, state)  # [N, T, H * G * D]
        if len(self._layers) == 1:
            return self._output(attended[0]).unsqueeze(0)
        outputs = torch.bmm(attended, self._outputs)
        if self._output_biases is not None:
            outputs += self._output_biases
        return outputs

    def _attend(self, hidden: torch.Tensor, state: PassState) -> torch.Tensor:
        """Attention of every layer of the group on the same hidden state: [T, E] -> [N, T, H * G * D]."""
        c, layout, num_layers = self._config, state.layout, len(self._layers)
        num_queries, num_kv = c.num_heads, c.num_kv_heads
        qkv = self._qkv(unit_rms(hidden, self._eps).to(c.dtype)).float()
        heads = qkv.view(-1, num_layers, num_queries + 2 * num_kv, c.head_dim)  # [T, N, H * G + 2 * H, D]
        if self._head_norms is not None:
            heads = torch.where(self._is_normed, unit_rms(heads, self._eps) * self._head_norms, heads)
        heads = rotate(heads, state.rotation)
        self._store(heads[:, :, num_queries:], state)
        queries = heads[:, :, :num_queries]
        attended = [
            self._attend_group(queries, group, entries, state.pool)
            for group, entries in zip(layout.groups, state.read_entries, strict=True)
        ]
        rows = attended[0] if len(attended) == 1 else torch.cat(attended, dim=1)  # [N, query rows, H * G * D]
        if layout.place_of_row is not None:
            rows = rows.index_select(1, layout.place_of_row)
        return rows.to(c.dtype)

    def _attend_group(
        self, queries: torch.Tensor, group: AttentionGroup, entries: torch.Tensor, pool: KVPool
    ) -> torch.Tensor:
        """Attention of one group of segments: [T, N, H * G, D] -> [N, B * M, H * G * D]."""
        c, num_layers = self._config, len(self._layers)
        if group.rows is not None:
            queries = queries.index_select(0, group.rows)
        shape = (num_layers, c.num_kv_heads, group.num_segments, group.padded_rows, c.num_queries_per_kv, c.head_dim)
        by_row = (shape[2], shape[3], shape[0], shape[1], shape[4], shape[5])
        queries = queries.reshape(by_row).permute(2, 3, 0, 1, 4, 5)  # [N, H, B, M, G, D]
        queries = queries.reshape(shape[0] * shape[1], shape[2], shape[3] * shape[4], shape[5])
        cached = pool.table.index_select(0, self._entries(entries)).float()
        cached = cached.view(shape[0] * shape[1] * len(group.blocks), -1, cached.shape[1])
        mask = group.mask_for_heads(shape[0] * shape[1])
        attended = self._attention(queries, cached, mask, group.blocks).view(shape)
        return attended.permute(0, 2, 3, 1, 4, 5).reshape(num_layers, -1, c.num_heads * c.head_dim)

    def _entries(self, entries: torch.Tensor) -> torch.Tensor:
        """This group's part of the pool's table rows, flattened in the order layer, head, token."""
        num_kv = self._config.num_kv_heads
        return entries[self._layers.start * num_kv : self._layers.stop * num_kv].view(-1)

    def _store(self, pairs: torch.Tensor, state: PassState) -> None:
        """Write the rows' keys and values, [T, N, 2 * H, D], key and value of a head side by side."""
        num_rows, num_heads, writable = (
            pairs.shape[0],
            len(self._layers) * self._config.num_kv_heads,
            state.pool.writable,
        )
        pairs = pairs.reshape(num_rows, num_heads, -1).transpose(0, 1)  # [N * H, T, 2 * D]
        entries = self._entries(state.write_entries)
        writable.index_copy_(0, entries, pairs.reshape(-1, pairs.shape[2]).to(writable.dtype))

    def mlp_output(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The MLP of the group's `layer`-th layer, [T, E] -> [T, E]."""
        gate_up, down = self._mlps[layer]
        gate, up = gate_up(unit_rms(hidden, self._eps).to(self._config.dtype)).chunk(2, dim=-1)  # [T, F] each
        return down(functional.silu(gate) * up)

    def staged_mlp_outputs(self, residuals: torch.Tensor) -> torch.Tensor:
        """All MLPs at once, M_i = MLP_i(h + A_1 + ... + A_i) of the running residuals [N, T, E]."""
        if not self._is_staged:  # a single layer
            return self.mlp_output(0, residuals[0]).unsqueeze(0)
        gate_up = torch.bmm(unit_rms(residuals, self._eps).to(self._config.dtype), self._gate_ups)  # [N, T, 2 * F]
        if self._gate_up_biases is not None:
            gate_up += self._gate_up_biases
        gate, up = gate_up.chunk(2, dim=-1)
        downs = torch.bmm(functional.silu(gate) * up, self._downs)  # [N, T, E]
        if self._down_biases is not None:
            downs += self._down_biases
        return downs


def _cat(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _stack(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present)[:, None] if present else None


def _pair_heads(keys: torch.Tensor, values: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of the key and value projections [H * D, ...] as key, value of head 0, key, value of head 1, ..."""
    heads = [part.view(-1, 1, head_dim, *part.shape[1:]) for part in (keys, values)]
    return torch.cat(heads, dim=1).reshape(-1, *keys.shape[1:])


def _head_norms(config: ModelConfig, weights: Sequence[LayerWeights]) -> torch.Tensor | None:
    """Norm weights of all heads of the group's projections, [N, H * G + 2 * H, D] (1 for values), or None."""
    rows = []
    for w in weights:
        if w.query_norm is None or w.key_norm is None:
            return None
        pair = torch.stack([w.key_norm, torch.ones_like(w.key_norm)])  # key, value
        rows.append(torch.cat([w.query_norm.expand(config.num_heads, -1), pair.repeat(config.num_kv_heads, 1)]))
    return torch.stack(rows)


def _is_normed(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """Which heads of a projection are normed where there are head norms: [H * G + 2 * H, 1]."""
    pairs = [True, False] * config.num_kv_heads
    return torch.tensor([True] * config.num_heads + pairs, device=device)[:, None]
