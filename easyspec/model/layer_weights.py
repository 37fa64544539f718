"""The packed weights of one decoder layer, or of a rank's shard of it, read as its LayerSpec says.

Dimensions: `Q` query heads, `H` KV heads, `D` head size, `E` hidden size, `F` MLP size, `X` experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from easyspec.model.config import ModelConfig
from easyspec.model.layer_spec import ExpertsSpec, HeadNorm, LayerSpec, MlpSpec, NormKind, NormSpec, RotarySpec
from easyspec.model.weight_reader import WeightReader
from easyspec.ops.packed import PackedWeight
from easyspec.ops.program import Expert, HeadShape
from easyspec.ops.weights import Weight, can_stack, stack_outputs
from easyspec.parallel.shard import Shard


@dataclass(frozen=True)
class Linear:
    """A packed weight and its bias."""

    weight: PackedWeight
    bias: torch.Tensor | None


@dataclass(frozen=True)
class NormWeights:
    """weight, bias: float32 [E]."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Mlp:
    """gate, up: [F, E]; down: [E, F]. Without a gate `up` alone is activated."""

    gate: Linear | None
    up: Linear
    down: Linear

    @property
    def weights(self) -> list[PackedWeight]:
        gates = [] if self.gate is None else [self.gate.weight]
        return [*gates, self.up.weight, self.down.weight]


@dataclass(frozen=True)
class Experts:
    """router: [X, E]."""

    router: Linear
    experts: tuple[Expert, ...]

    @property
    def weights(self) -> list[PackedWeight]:
        return [self.router.weight, *(w for expert in self.experts for w in (expert.gate, expert.up, expert.down))]


FeedForward: TypeAlias = Mlp | Experts


@dataclass(frozen=True)
class Layer:
    """One layer, or a rank's shard of it.

    qkv: one product for queries, keys and values, or three where their formats differ. Norms that the family has not
    are None. `mlp_shard` is this rank's part of the MLP where only MLPs are split.
    """

    index: int
    spec: LayerSpec
    heads: HeadShape
    input_norm: NormWeights | None
    qkv: tuple[Linear, ...]
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    sinks: torch.Tensor | None
    output: Linear
    attention_exit_norm: NormWeights | None
    mlp_norm: NormWeights | None
    mlp: FeedForward
    mlp_exit_norm: NormWeights | None
    mlp_shard: FeedForward | None

    @property
    def weights(self) -> list[PackedWeight]:
        """Every packed weight, those of the shard aside."""
        return [*(linear.weight for linear in self.qkv), self.output.weight, *self.mlp.weights]


def load_layer(reader: WeightReader, config: ModelConfig, index: int, shard: Shard, mlp_shard: Shard | None) -> Layer:
    """Read and pack one layer, or a rank's shard of it.

    Of the biases that come after a sum over ranks, rank 0 has all and the others none.
    """
    return _LayerLoader(reader, config, index, shard).load(mlp_shard)


def load_norm(reader: WeightReader, name: str, spec: NormSpec, size: int) -> NormWeights:
    """The weights of a norm, as they are multiplied."""
    weight = reader.vector(f"{name}.weight", size)
    weight = weight + 1.0 if spec.kind is NormKind.OFFSET else weight
    return NormWeights(weight, reader.vector(f"{name}.bias", size) if spec.has_bias else None)


class _LayerLoader:
    def __init__(self, reader: WeightReader, config: ModelConfig, index: int, shard: Shard) -> None:
        self._reader = reader
        self._config = config
        self._index = index
        self._shard = shard
        self._spec = config.spec.layers[index]
        self._prefix = f"model.layers.{index}."

    def load(self, mlp_shard: Shard | None) -> Layer:
        c, spec, names = self._config, self._spec, self._config.names
        num_queries = c.num_heads * c.head_dim
        query_rows = self._query_rows
        output = self._reader.weight(
            f"{self._prefix}{names.output}.weight", (c.hidden_size, num_queries), None, query_rows
        )
        output_bias = self._bias(names.output, c.hidden_size, exists=spec.attention.has_output_bias and self._is_first)
        heads = HeadShape(len(query_rows) // c.head_dim, len(self._kv_rows) // c.head_dim, c.head_dim)
        own_heads = range(query_rows.start // c.head_dim, query_rows.stop // c.head_dim)
        has_sinks = spec.attention.has_sinks
        places = spec.norms
        return Layer(
            index=self._index,
            spec=spec,
            heads=heads,
            input_norm=self._norm(names.input_norm, exists=places.has_entrance),
            qkv=self._qkv(),
            query_norm=self._head_norm(names.query_norm, c.num_heads),
            key_norm=self._head_norm(names.key_norm, c.num_kv_heads),
            sinks=self._reader.vector(self._prefix + names.sinks, c.num_heads, own_heads) if has_sinks else None,
            output=Linear(self._reader.pack(output), output_bias),
            attention_exit_norm=self._norm(names.attention_exit_norm, exists=places.has_exit),
            mlp_norm=self._norm(names.mlp_norm, exists=places.has_entrance and not places.is_parallel),
            mlp=self._feed_forward(self._shard),
            mlp_exit_norm=self._norm(names.mlp_exit_norm, exists=places.has_exit),
            mlp_shard=None if mlp_shard is None else self._feed_forward(mlp_shard),
        )

    @property
    def _is_first(self) -> bool:
        return self._shard.rank == 0

    @property
    def _query_rows(self) -> range:
        return _scaled(self._shard.rows(self._config.num_heads), self._config.head_dim)

    @property
    def _kv_rows(self) -> range:
        return _scaled(self._shard.kv_heads(self._config.num_kv_heads), self._config.head_dim)

    def _norm(self, name: str, *, exists: bool) -> NormWeights | None:
        return (
            load_norm(self._reader, self._prefix + name, self._spec.norm, self._config.hidden_size) if exists else None
        )

    def _bias(self, name: str, size: int, part: range | None = None, *, exists: bool) -> torch.Tensor | None:
        return self._reader.vector(f"{self._prefix}{name}.bias", size, part) if exists else None

    def _qkv(self) -> tuple[Linear, ...]:
        """Queries, keys and values one below the other; rows of heads in the order in which they are turned."""
        c, names, attention = self._config, self._config.names, self._spec.attention
        num_queries, num_kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if names.qkv is not None:
            size = num_queries + 2 * num_kv
            starts = (0, num_queries, num_queries + num_kv)
            places = [(names.qkv, size, start) for start in starts]
        else:
            places = [(names.query, num_queries, 0), (names.key, num_kv, 0), (names.value, num_kv, 0)]
        weights: list[Weight] = []
        biases: list[torch.Tensor | None] = []
        rows_of = (self._query_rows, self._kv_rows, self._kv_rows)
        for (name, size, start), rows, is_turned in zip(places, rows_of, (True, True, False), strict=True):
            part = range(start + rows.start, start + rows.stop)
            weight = self._reader.weight(f"{self._prefix}{name}.weight", (size, c.hidden_size), part)
            bias = self._bias(name, size, part, exists=attention.has_qkv_bias)
            if is_turned and attention.rotary is not None and attention.rotary.is_interleaved:
                order = turned_order(len(rows), c.head_dim, attention.rotary)
                weight, bias = weight.outputs(order), None if bias is None else bias[order]
            weights.append(weight)
            biases.append(bias)
        if can_stack(weights):
            present = [bias for bias in biases if bias is not None]
            return (Linear(self._reader.pack(stack_outputs(weights)), torch.cat(present) if present else None),)
        return tuple(Linear(self._reader.pack(weight), bias) for weight, bias in zip(weights, biases, strict=True))

    def _head_norm(self, name: str, num_heads: int) -> torch.Tensor | None:
        kind, spec = self._spec.attention.head_norm, NormSpec(self._spec.norm.eps, self._spec.norm.kind)
        if kind is HeadNorm.NONE:
            return None
        size = self._config.head_dim * (num_heads if kind is HeadNorm.ROWS else 1)
        return load_norm(self._reader, self._prefix + name, spec, size).weight

    def _feed_forward(self, shard: Shard) -> FeedForward:
        if isinstance(self._spec.mlp, ExpertsSpec):
            return self._experts(self._spec.mlp, shard)
        return self._mlp(self._spec.mlp, shard)

    def _mlp(self, spec: MlpSpec, shard: Shard) -> Mlp:
        names, rows = self._config.names, shard.rows(spec.size)
        gate: Linear | None
        if names.gate_up is not None:
            gate = self._inner(names.gate_up, 2 * spec.size, rows, spec)
            up = self._inner(names.gate_up, 2 * spec.size, range(spec.size + rows.start, spec.size + rows.stop), spec)
        else:
            gate = self._inner(names.gate, spec.size, rows, spec) if spec.is_gated else None
            up = self._inner(names.up, spec.size, rows, spec)
        size = self._config.hidden_size
        down = self._reader.weight(f"{self._prefix}{names.down}.weight", (size, spec.size), columns=rows)
        bias = self._bias(names.down, size, exists=spec.has_bias and shard.rank == 0)
        return Mlp(gate, up, Linear(self._reader.pack(down), bias))

    def _inner(self, name: str, size: int, rows: range, spec: MlpSpec | ExpertsSpec) -> Linear:
        weight = self._reader.weight(f"{self._prefix}{name}.weight", (size, self._config.hidden_size), rows)
        return Linear(self._reader.pack(weight), self._bias(name, size, rows, exists=spec.has_bias))

    def _experts(self, spec: ExpertsSpec, shard: Shard) -> Experts:
        c, names, rows = self._config, self._config.names, shard.rows(spec.size)
        router = self._reader.head(f"{self._prefix}{names.router}.weight", (spec.num_experts, c.hidden_size))
        bias = self._bias(names.router, spec.num_experts, exists=spec.has_router_bias)
        experts = []
        for number in range(spec.num_experts):
            gate = self._inner(names.of_expert(number, names.expert_gate), spec.size, rows, spec)
            up = self._inner(names.of_expert(number, names.expert_up), spec.size, rows, spec)
            down_name = names.of_expert(number, names.expert_down)
            down = self._reader.weight(f"{self._prefix}{down_name}.weight", (c.hidden_size, spec.size), columns=rows)
            down_bias = self._bias(down_name, c.hidden_size, exists=spec.has_bias and shard.rank == 0)
            experts.append(Expert(gate.weight, up.weight, self._reader.pack(down), gate.bias, up.bias, down_bias))
        return Experts(Linear(self._reader.pack(router), bias), tuple(experts))


def turned_order(num_rows: int, head_dim: int, rotary: RotarySpec) -> torch.Tensor:
    """Rows of heads whose neighbours turn against each other, so that dimension i turns against i + dim / 2."""
    places = torch.arange(head_dim)
    turned, rest = places[: rotary.dim], places[rotary.dim :]
    in_head = torch.cat([turned[0::2], turned[1::2], rest])
    starts = torch.arange(0, num_rows, head_dim)
    return (starts[:, None] + in_head[None]).flatten()


def _scaled(part: range, factor: int) -> range:
    return range(part.start * factor, part.stop * factor)
