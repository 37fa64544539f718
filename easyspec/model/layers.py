"""Decoder layers: their packed weights, and the operations of a group of them.

Dimensions: `T` rows of the pass, `N` layers in the group, `Q` query heads, `H` KV heads, `D` head size, `E` hidden
size, `F` MLP size, `R` ranks.

One function serves the ordinary decoder (every group has one layer) and EasySpec's fuzzy steps (arXiv 2502.02493,
algorithm 2): inside a group every attention reads the hidden state at the group's entrance. The MLPs then run one after
the other on the running residual, or (staged) all at once, each on the attention accumulated up to its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from easyspec.model.config import ModelConfig
from easyspec.model.weight_reader import WeightReader
from easyspec.ops.packed import PackedWeight
from easyspec.ops.program import (
    Accumulate,
    Activation,
    Attend,
    Buffer,
    Gated,
    GatherFromRanks,
    HeadShape,
    Norm,
    Product,
    ProgramWriter,
    Rotary,
    Rotate,
    SumOverRanks,
)
from easyspec.ops.weights import can_stack, stack_outputs
from easyspec.parallel.shard import WHOLE, Shard


@dataclass(frozen=True)
class Linear:
    """A packed weight and its bias."""

    weight: PackedWeight
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Mlp:
    """gate, up: [F, E]; down: [E, F]."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Layer:
    """One layer, or a rank's shard of it.

    qkv: one product for queries, keys and values, or three where their formats differ. `mlp_shard` is this rank's part
    of the MLP where only MLPs are split.
    """

    index: int
    heads: HeadShape
    input_norm: torch.Tensor
    qkv: tuple[Linear, ...]
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor
    mlp: Mlp
    mlp_shard: Mlp | None
    window: int | None

    @property
    def weights(self) -> list[PackedWeight]:
        """Every packed weight, those of the shard aside."""
        linears = [*self.qkv, self.output, self.mlp.gate, self.mlp.up, self.mlp.down]
        return [linear.weight for linear in linears]


def load_layer(reader: WeightReader, config: ModelConfig, index: int, shard: Shard, mlp_shard: Shard | None) -> Layer:
    """Read and pack one layer, or a rank's shard of it.

    Of the biases that come after a sum over ranks, rank 0 has all and the others none.
    """
    c, prefix = config, f"model.layers.{index}"
    query_rows = _scaled(shard.rows(c.num_heads), c.head_dim)
    kv_rows = _scaled(shard.kv_heads(c.num_kv_heads), c.head_dim)
    num_queries, num_kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    projections = [
        (f"{prefix}.self_attn.{name}_proj", num_rows, rows)
        for name, num_rows, rows in (("q", num_queries, query_rows), ("k", num_kv, kv_rows), ("v", num_kv, kv_rows))
    ]
    weights = [reader.weight(f"{name}.weight", (num_rows, c.hidden_size), rows) for name, num_rows, rows in projections]
    biases = [
        reader.vector(f"{name}.bias", num_rows, rows) if c.has_qkv_bias else None
        for name, num_rows, rows in projections
    ]
    qkv: tuple[Linear, ...]
    if can_stack(weights):
        present = [bias for bias in biases if bias is not None]
        qkv = (Linear(reader.pack(stack_outputs(weights)), torch.cat(present) if present else None),)
    else:
        qkv = tuple(Linear(reader.pack(weight), bias) for weight, bias in zip(weights, biases, strict=True))
    output = reader.weight(f"{prefix}.self_attn.o_proj.weight", (c.hidden_size, num_queries), columns=query_rows)
    has_output_bias = c.has_output_bias and shard.rank == 0
    head_norms = (
        [reader.vector(f"{prefix}.self_attn.{name}_norm.weight", c.head_dim) for name in ("q", "k")]
        if c.has_qk_norm
        else [None, None]
    )
    return Layer(
        index=index,
        heads=HeadShape(len(query_rows) // c.head_dim, len(kv_rows) // c.head_dim, c.head_dim),
        input_norm=reader.vector(f"{prefix}.input_layernorm.weight", c.hidden_size),
        qkv=tuple(qkv),
        query_norm=head_norms[0],
        key_norm=head_norms[1],
        output=Linear(
            reader.pack(output),
            reader.vector(f"{prefix}.self_attn.o_proj.bias", c.hidden_size) if has_output_bias else None,
        ),
        mlp_norm=reader.vector(f"{prefix}.post_attention_layernorm.weight", c.hidden_size),
        mlp=_load_mlp(reader, c, prefix, shard),
        mlp_shard=None if mlp_shard is None else _load_mlp(reader, c, prefix, mlp_shard),
        window=c.window_of_layer(index),
    )


def _load_mlp(reader: WeightReader, config: ModelConfig, prefix: str, shard: Shard) -> Mlp:
    c, rows = config, shard.rows(config.intermediate_size)
    gate, up = (
        Linear(
            reader.pack(reader.weight(f"{prefix}.mlp.{name}_proj.weight", (c.intermediate_size, c.hidden_size), rows)),
            reader.vector(f"{prefix}.mlp.{name}_proj.bias", c.intermediate_size, rows) if c.has_mlp_bias else None,
        )
        for name in ("gate", "up")
    )
    down = reader.weight(f"{prefix}.mlp.down_proj.weight", (c.hidden_size, c.intermediate_size), columns=rows)
    has_down_bias = c.has_mlp_bias and shard.rank == 0
    down_bias = reader.vector(f"{prefix}.mlp.down_proj.bias", c.hidden_size) if has_down_bias else None
    return Mlp(gate, up, Linear(reader.pack(down), down_bias))


def _scaled(part: range, factor: int) -> range:
    return range(part.start * factor, part.stop * factor)


class GroupWriter:
    """Writes groups of layers into a program. Buffers are shared by all groups, one for each layer of a group."""

    def __init__(
        self,
        program: ProgramWriter,
        config: ModelConfig,
        rotary: Rotary,
        hidden: Buffer,
        tensor_shard: Shard = WHOLE,
        layer_shard: Shard = WHOLE,
    ) -> None:
        """`tensor_shard`: every layer is split over ranks; `layer_shard`: the layers of a group are."""
        self._program = program
        self._config = config
        self._rotary = rotary
        self._hidden = hidden
        self._tensor_shard = tensor_shard
        self._layer_shard = layer_shard
        self._scratch: dict[tuple[str, int], Buffer] = {}

    def write(self, layers: Sequence[Layer], *, is_staged: bool) -> None:
        """One group: hidden [T, E] at its entrance becomes hidden at its exit."""
        if len(layers) == 1:
            self._write_single(layers[0])
            return
        outputs = [self._buffer("output", place, self._config.hidden_size) for place in range(len(layers))]
        own = self._own_places(len(layers))
        for place in own:
            self._attend(layers[place], place, into=outputs[place], adds=False)
        self._share_outputs(outputs, own)
        if is_staged:
            self._write_staged_mlps(layers, outputs, own)
            return
        for place, layer in enumerate(layers):
            self._program.add(Accumulate(self._hidden, (outputs[place],), (self._hidden,)))
            self._add_mlp(layer, layer.mlp_shard)

    def _write_single(self, layer: Layer) -> None:
        """Where ranks share the layers of groups, each computes a layer by itself whole."""
        if self._tensor_shard.size == 1:
            self._attend(layer, 0, into=self._hidden, adds=True)
        else:
            output = self._buffer("output", 0, self._config.hidden_size)
            self._attend(layer, 0, into=output, adds=False)
            self._program.add(SumOverRanks((output,)), Accumulate(self._hidden, (output,), (self._hidden,)))
        self._add_mlp(layer, None)

    def _own_places(self, num_layers: int) -> range:
        """Which of a group's layers this rank computes: equal runs, the last ones short or empty."""
        most = most_layers(num_layers, self._layer_shard.size)
        start = self._layer_shard.rank * most
        return range(min(start, num_layers), min(start + most, num_layers))

    def _share_outputs(self, outputs: Sequence[Buffer], own: range) -> None:
        if self._tensor_shard.size > 1:
            self._program.add(SumOverRanks(tuple(outputs)))
        if self._layer_shard.size > 1:
            most = most_layers(len(outputs), self._layer_shard.size)
            parts = [outputs[place] for place in own]
            self._program.add(GatherFromRanks((*parts, *[None] * (most - len(own))), tuple(outputs)))

    def _attend(self, layer: Layer, place: int, *, into: Buffer, adds: bool) -> None:
        """A_i of one layer on the hidden state, written or added to `into`; writes keys and values."""
        c, heads = self._config, layer.heads
        normed = self._buffer("normed", place, c.hidden_size)
        qkv = self._buffer("qkv", place, heads.qkv_width)
        attended = self._buffer("attended", place, heads.num_heads * heads.head_dim)
        self._program.add(Norm(self._hidden, normed, layer.input_norm, c.rms_norm_eps))
        column = 0
        for linear in layer.qkv:
            self._program.add(Product(normed, qkv, linear.weight, linear.bias, column=column))
            column += linear.weight.num_outputs
        self._program.add(
            Rotate(
                qkv,
                layer.index,
                heads,
                self._rotary,
                heads.head_dim**-0.5,
                layer.query_norm,
                layer.key_norm,
                c.rms_norm_eps,
            ),
            Attend(qkv, attended, layer.index, heads, layer.window),
            Product(attended, into, layer.output.weight, layer.output.bias, adds=adds),
        )

    def _add_mlp(self, layer: Layer, shard: Mlp | None) -> None:
        """hidden += MLP(hidden), of the whole layer or of all ranks' shards together."""
        is_split = shard is not None or self._tensor_shard.size > 1
        mlp = shard or layer.mlp
        if not is_split:
            self._run_mlp(layer, mlp, 0, self._hidden, into=self._hidden, adds=True)
            return
        part = self._buffer("output", 0, self._config.hidden_size)  # which has been added up by now
        self._run_mlp(layer, mlp, 0, self._hidden, into=part, adds=False)
        self._program.add(SumOverRanks((part,)), Accumulate(self._hidden, (part,), (self._hidden,)))

    def _run_mlp(self, layer: Layer, mlp: Mlp, place: int, residual: Buffer, *, into: Buffer, adds: bool) -> None:
        c = self._config
        normed = self._buffer("normed", place, c.hidden_size)
        inner = self._buffer("inner", place, mlp.gate.weight.num_outputs)
        self._program.add(
            Norm(residual, normed, layer.mlp_norm, c.rms_norm_eps),
            Gated(normed, inner, mlp.gate.weight, mlp.up.weight, Activation.SILU, mlp.gate.bias, mlp.up.bias),
            Product(inner, into, mlp.down.weight, mlp.down.bias, adds=adds),
        )

    def _write_staged_mlps(self, layers: Sequence[Layer], outputs: Sequence[Buffer], own: range) -> None:
        """M_i = MLP_i(h + A_1 + ... + A_i) of all layers at once; hidden = h + sum of A + sum of M."""
        size, places = self._config.hidden_size, range(len(layers))
        residuals = tuple(self._buffer("residual", place, size) for place in places)
        self._program.add(Accumulate(self._hidden, tuple(outputs), residuals))
        for place in own:  # an output has been added up, its place is free
            self._run_mlp(layers[place], layers[place].mlp, place, residuals[place], into=outputs[place], adds=False)
        if self._tensor_shard.size * self._layer_shard.size == 1:
            nothing = [None] * (len(layers) - 1)
            self._program.add(Accumulate(residuals[-1], tuple(outputs), (*nothing, self._hidden)))
            return
        part = outputs[own.start] if own else outputs[0]
        others = tuple(outputs[place] for place in own[1:])
        if others:
            self._program.add(Accumulate(part, others, (*[None] * (len(others) - 1), part)))
        self._program.add(SumOverRanks((part,), is_part=bool(own)), Accumulate(residuals[-1], (part,), (self._hidden,)))

    def _buffer(self, name: str, place: int, width: int) -> Buffer:
        key = (f"{name} {width}", place)
        if key not in self._scratch:
            self._scratch[key] = self._program.buffer(width)
        return self._scratch[key]


def most_layers(num_layers: int, num_ranks: int) -> int:
    """Layers of a group on the busiest rank."""
    return -(-num_layers // num_ranks)
