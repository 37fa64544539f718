"""The operations of a group of decoder layers.

Dimensions: `T` rows of the pass, `N` layers in the group, `Q` query heads, `H` KV heads, `D` head size, `E` hidden
size, `F` MLP size, `R` ranks.

One function serves the ordinary decoder (every group has one layer) and EasySpec's fuzzy steps (arXiv 2502.02493,
algorithm 2): inside a group every attention reads the hidden state at the group's entrance. The MLPs then run one after
the other on the running residual, or (staged) all at once, each on the attention accumulated up to its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from easyspec.model.config import ModelConfig
from easyspec.model.layer_spec import ExpertsSpec, HeadNorm, MlpSpec, NormKind, NormSpec, RotarySpec
from easyspec.model.layer_weights import Experts, FeedForward, Layer, NormWeights
from easyspec.ops.program import (
    Accumulate,
    Activate,
    Attend,
    Buffer,
    Combine,
    ExpertGated,
    ExpertProduct,
    Gated,
    GatherFromRanks,
    Norm,
    Product,
    ProgramWriter,
    Rotary,
    Rotate,
    Route,
    Scale,
    SumOverRanks,
)
from easyspec.parallel.shard import WHOLE, Shard


class GroupWriter:
    """Writes groups of layers into a program. Buffers are shared by all groups, one for each layer of a group."""

    def __init__(
        self,
        program: ProgramWriter,
        config: ModelConfig,
        rotaries: Mapping[RotarySpec, Rotary],
        hidden: Buffer,
        tensor_shard: Shard = WHOLE,
        layer_shard: Shard = WHOLE,
    ) -> None:
        """`tensor_shard`: every layer is split over ranks; `layer_shard`: the layers of a group are."""
        self._program = program
        self._config = config
        self._rotaries = rotaries
        self._hidden = hidden
        self._tensor_shard = tensor_shard
        self._layer_shard = layer_shard
        self._scratch: dict[tuple[str, int], Buffer] = {}

    def write(self, layers: Sequence[Layer], *, is_staged: bool) -> None:
        """One group: hidden [T, E] at its entrance becomes hidden at its exit."""
        if len(layers) == 1:  # where ranks share the layers of groups, each computes a layer by itself whole
            (layer,) = layers
            if self._tensor_shard.size == 1 and not layer.spec.norms.is_parallel:
                self._attend(layer, 0, into=self._hidden, adds=True)
                self._add_mlp(layer, None)
                return
            output = self._buffer("attention output", 0, self._config.hidden_size)
            self._attend(layer, 0, into=output, adds=False)
            self._sum_over_ranks((layer,), (output,))
            self._add_both(layer, output, None)
            return
        outputs = [self._buffer("output", place, self._config.hidden_size) for place in range(len(layers))]
        # Which of a group's layers this rank computes: equal runs, the last ones short or empty.
        num_layers = len(layers)
        most = most_layers(num_layers, self._layer_shard.size)
        start = self._layer_shard.rank * most
        own = range(min(start, num_layers), min(start + most, num_layers))
        # All read the hidden state as it was at the entrance; it changes only after the last of them.
        for place in own:
            self._attend(layers[place], place, into=outputs[place], adds=False)
        self._sum_over_ranks(layers, outputs)
        if self._layer_shard.size > 1:
            parts = [outputs[place] for place in own]
            self._program.add(GatherFromRanks((*parts, *[None] * (most - len(own))), tuple(outputs)))
        if is_staged:
            self._write_staged_mlps(layers, outputs, own)
            return
        for place, layer in enumerate(layers):
            self._add_both(layer, outputs[place], layer.mlp_shard)

    def _sum_over_ranks(self, layers: Sequence[Layer], outputs: Sequence[Buffer]) -> None:
        """Attention of all ranks' heads together."""
        if self._tensor_shard.size == 1:
            return
        self._program.add(SumOverRanks(tuple(outputs)))
        # A norm of a sum is not the sum of norms: only what all ranks have added may be finished.
        for layer, output in zip(layers, outputs, strict=True):
            self._finish(layer, layer.attention_exit_norm, output)

    def _add_both(self, layer: Layer, output: Buffer, shard: FeedForward | None) -> None:
        """hidden += what attention came to, hidden += MLP(hidden); a parallel layer's MLP reads hidden before both."""
        accumulate = Accumulate(self._hidden, (output,), (self._hidden,))
        if not layer.spec.norms.is_parallel:
            self._program.add(accumulate)
            self._add_mlp(layer, shard)
            return
        part = self._buffer("part", 0, self._config.hidden_size)
        self._run_mlp(layer, shard or layer.mlp, 0, self._hidden, into=part, adds=False)
        if shard is not None or self._tensor_shard.size > 1:
            self._program.add(SumOverRanks((part,)))
        self._program.add(Accumulate(self._hidden, (output, part), (None, self._hidden)))

    def _attend(self, layer: Layer, place: int, *, into: Buffer, adds: bool) -> None:
        """A_i of one layer on the hidden state, written or added to `into`; writes keys and values."""
        c, heads, spec = self._config, layer.heads, layer.spec.attention
        qkv = self._buffer("qkv", place, heads.qkv_width)
        attended = self._buffer("attended", place, heads.num_heads * heads.head_dim)
        source = self._normed(layer, layer.input_norm, place, self._hidden)
        column = 0
        for linear in layer.qkv:
            self._program.add(Product(source, qkv, linear.weight, linear.bias, column=column))
            column += linear.weight.num_outputs
        query_norm, key_norm = layer.query_norm, layer.key_norm
        if spec.head_norm is HeadNorm.ROWS:
            assert query_norm is not None, "loaded"
            assert key_norm is not None, "loaded"
            self._program.add(
                Norm(qkv, qkv, query_norm, layer.spec.norm.eps),
                Norm(qkv, qkv, key_norm, layer.spec.norm.eps, column=heads.num_heads * heads.head_dim),
            )
            query_norm = key_norm = None
        rotary = None if spec.rotary is None else self._rotaries[spec.rotary]
        self._program.add(
            Rotate(
                qkv,
                layer.index,
                heads,
                rotary,
                spec.scale,
                query_norm,
                key_norm,
                layer.spec.norm.eps,
                spec.is_norm_last,
            ),
            Attend(qkv, attended, layer.index, heads, spec.window, spec.soft_cap, layer.sinks),
        )
        output = layer.output
        if self._is_plain(layer):
            self._program.add(Product(attended, into, output.weight, output.bias, adds=adds))
            return
        part = self._buffer("part", place, c.hidden_size) if adds else into
        self._program.add(Product(attended, part, output.weight, output.bias))
        if self._tensor_shard.size == 1:
            self._finish(layer, layer.attention_exit_norm, part)
        if adds:
            self._program.add(Accumulate(into, (part,), (into,)))

    def _is_plain(self, layer: Layer) -> bool:
        """Whether what attention and MLP come to is added as it is."""
        return not layer.spec.norms.has_exit and layer.spec.residual_factor == 1.0

    def _finish(self, layer: Layer, norm: NormWeights | None, part: Buffer) -> None:
        """What stands between a finished sum and the hidden state: `part` is changed in place."""
        if norm is not None:
            self._program.add(_norm(layer.spec.norm, norm, part, part))
        if layer.spec.residual_factor != 1.0:
            self._program.add(Scale(part, layer.spec.residual_factor))

    def _normed(self, layer: Layer, norm: NormWeights | None, place: int, source: Buffer) -> Buffer:
        """`source` behind a norm, or itself where the layer has none there."""
        if norm is None:
            return source
        normed = self._buffer("normed", place, self._config.hidden_size)
        self._program.add(_norm(layer.spec.norm, norm, source, normed))
        return normed

    def _add_mlp(self, layer: Layer, shard: FeedForward | None) -> None:
        """hidden += MLP(hidden), of the whole layer or of all ranks' shards together."""
        is_split = shard is not None or self._tensor_shard.size > 1
        mlp = shard or layer.mlp
        if not is_split and self._is_plain(layer):
            self._run_mlp(layer, mlp, 0, self._hidden, into=self._hidden, adds=True)
            return
        part = self._buffer("output", 0, self._config.hidden_size)  # which has been added up by now
        self._run_mlp(layer, mlp, 0, self._hidden, into=part, adds=False)
        if is_split:
            self._program.add(SumOverRanks((part,)))
        self._finish(layer, layer.mlp_exit_norm, part)
        self._program.add(Accumulate(self._hidden, (part,), (self._hidden,)))

    def _run_mlp(
        self, layer: Layer, mlp: FeedForward, place: int, residual: Buffer, *, into: Buffer, adds: bool
    ) -> None:
        norm = layer.input_norm if layer.spec.norms.is_parallel else layer.mlp_norm
        source = self._normed(layer, norm, place, residual)
        if isinstance(mlp, Experts):
            self._run_experts(layer, mlp, place, source, into=into, adds=adds)
            return
        assert isinstance(layer.spec.mlp, MlpSpec), "of its own spec"
        activation = layer.spec.mlp.activation
        inner = self._buffer("inner", place, mlp.up.weight.num_outputs)
        if mlp.gate is None:
            self._program.add(Product(source, inner, mlp.up.weight, mlp.up.bias), Activate(inner, activation))
        else:
            self._program.add(
                Gated(source, inner, mlp.gate.weight, mlp.up.weight, activation, mlp.gate.bias, mlp.up.bias)
            )
        self._program.add(Product(inner, into, mlp.down.weight, mlp.down.bias, adds=adds))

    def _run_experts(self, layer: Layer, mlp: Experts, place: int, source: Buffer, *, into: Buffer, adds: bool) -> None:
        spec, experts = layer.spec.mlp, mlp.experts
        assert isinstance(spec, ExpertsSpec), "of its own spec"
        logits = self._buffer("router", place, spec.num_experts)
        routes = self._buffer("routes", place, 2 * spec.num_chosen)
        inner = self._buffer("expert inner", place, experts[0].up.num_outputs, spec.num_chosen)
        parts = self._buffer("expert output", place, self._config.hidden_size, spec.num_chosen)
        self._program.add(
            Product(source, logits, mlp.router.weight, mlp.router.bias),
            Route(logits, routes, spec.num_chosen, spec.is_normalised),
            ExpertGated(source, routes, inner, experts, spec.activation),
            ExpertProduct(inner, routes, parts, experts),
            Combine(parts, routes, into, adds),
        )

    def _write_staged_mlps(self, layers: Sequence[Layer], outputs: Sequence[Buffer], own: range) -> None:
        """M_i = MLP_i(h + A_1 + ... + A_i) of all layers at once; hidden = h + sum of A + sum of M."""
        size, places = self._config.hidden_size, range(len(layers))
        residuals = tuple(self._buffer("residual", place, size) for place in places)
        self._program.add(Accumulate(self._hidden, tuple(outputs), residuals))
        for place in own:  # an output has been added up, its place is free
            layer = layers[place]
            before = residuals[place]
            if layer.spec.norms.is_parallel:
                before = residuals[place - 1] if place > 0 else self._hidden
            self._run_mlp(layer, layer.mlp, place, before, into=outputs[place], adds=False)
            if self._tensor_shard.size == 1:
                self._finish(layer, layer.mlp_exit_norm, outputs[place])
        if self._tensor_shard.size * self._layer_shard.size == 1:
            self._add_outputs(residuals[-1], outputs)
            return
        if self._tensor_shard.size > 1 and not all(map(self._is_plain, layers)):
            self._program.add(SumOverRanks(tuple(outputs)))
            for layer, output in zip(layers, outputs, strict=True):
                self._finish(layer, layer.mlp_exit_norm, output)
            self._add_outputs(residuals[-1], outputs)
            return
        part = outputs[own.start] if own else outputs[0]
        others = tuple(outputs[place] for place in own[1:])
        if others:
            self._program.add(Accumulate(part, others, (*[None] * (len(others) - 1), part)))
        # A rank without layers takes part as well, with zeros: a collective needs every rank.
        self._program.add(SumOverRanks((part,), is_part=bool(own)), Accumulate(residuals[-1], (part,), (self._hidden,)))

    def _add_outputs(self, residual: Buffer, outputs: Sequence[Buffer]) -> None:
        nothing = [None] * (len(outputs) - 1)
        self._program.add(Accumulate(residual, tuple(outputs), (*nothing, self._hidden)))

    def _buffer(self, name: str, place: int, width: int, per_row: int = 1) -> Buffer:
        key = (f"{name} {width} {per_row}", place)
        if key not in self._scratch:
            self._scratch[key] = self._program.buffer(width, per_row=per_row)
        return self._scratch[key]


def _norm(spec: NormSpec, weights: NormWeights, source: Buffer, output: Buffer) -> Norm:
    return Norm(source, output, weights.weight, spec.eps, weights.bias, spec.kind is NormKind.LAYER)


def most_layers(num_layers: int, num_ranks: int) -> int:
    """Layers of a group on the busiest rank."""
    return -(-num_layers // num_ranks)
