"""The decoder: embeddings, layer groups, final norm and head.

Dimensions: `T` rows of a pass, `E` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch.nn import functional

from easyspec.model.attention import AttentionFunction, blockwise_attention, flat_attention
from easyspec.model.captures import Recorder
from easyspec.model.config import ModelConfig
from easyspec.model.distributed_group import DistributedLayerGroup, RankPlacement, sharded_mlp
from easyspec.model.kv_cache import KVPool
from easyspec.model.layers import LayerGroup, LayerWeights, PassState, load_layer, unit_rms
from easyspec.model.linear import Linear
from easyspec.model.pass_graphs import (
    CapturedLayout,
    CaptureLimits,
    CaptureReport,
    CaptureRequest,
    PassDimensions,
    PassGraphs,
)
from easyspec.model.pass_orders import HeadOrder, Order, PassOrder, decode_order, encode_order
from easyspec.model.rope import rotation_table
from easyspec.model.row_layout import RowLayout, Segment, bucket, lay_out
from easyspec.model.weights import Checkpoint, TensorSource
from easyspec.parallel.layer_groups import LayerPlan, sequential_plan
from easyspec.parallel.ranks import SINGLE_RANK, Ranks
from easyspec.parallel.shard import WHOLE, Shard
from easyspec.speculation.parameters import MlpPlacement
from easyspec.speculation.split_choice import NO_ROWS, SplitRows, choose_split
from easyspec.speculation.transfer import to_device

AnyLayerGroup: TypeAlias = "LayerGroup | DistributedLayerGroup"
PassLayout: TypeAlias = "RowLayout | CapturedLayout"

# Layer plans whose wide groups are kept ready; the sequential plan counts as one and costs nothing.
MAX_PLANS = 4


@dataclass(frozen=True)
class EnteredPass:
    """A pass that has begun: its rows' embeddings [T, E], and what all its layers share."""

    embedded: torch.Tensor
    state: PassState


class Decoder:
    """A model of the Llama family over a KV pool, executed by a layer plan.

    `is_exact` chooses the attention whose bits for a row do not depend on the other rows (the base model needs
    it, a draft does not). Not thread-safe: one thread owns the device.

    Of several ranks, rank 0 is called and leads; the others `follow` and compute their part of its passes, as
    `placement` says. `layer_config` is what this rank's layers and KV pool see of the model.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        device: torch.device,
        *,
        is_exact: bool,
        ranks: Ranks = SINGLE_RANK,
        placement: RankPlacement = RankPlacement.TENSOR,
        open_tensors: Callable[[Path], TensorSource] = Checkpoint,
    ) -> None:
        """Raises ConfigurationError for a missing or corrupt checkpoint, or one that does not split evenly."""
        self._shard = Shard(ranks.rank, ranks.size) if placement is RankPlacement.TENSOR else WHOLE
        self._shard.check(config)
        if placement is RankPlacement.LAYERS_SHARDED_MLP:
            Shard(ranks.rank, ranks.size).check_mlp(config)
        self.config = config
        self.layer_config = self._shard.of(config)
        self._ranks = ranks
        self._announced_rows: tuple[int, ...] = ()
        self._placement = placement
        self.device = device
        self.sequential_plan = sequential_plan(config.num_layers)
        self._is_exact = is_exact
        self._attention: AttentionFunction = blockwise_attention if is_exact else flat_attention
        rotations = rotation_table(config, device)[:, None]
        self._rotations = torch.cat([rotations, torch.ones_like(rotations)], dim=1)  # [positions, 2, D / 2]
        # Queries and keys are turned, values are not.
        kinds = [0] * self.layer_config.num_heads + [0, 1] * self.layer_config.num_kv_heads
        self._head_rotation = torch.tensor(kinds, device=device)
        with open_tensors(folder) as checkpoint:
            self._layers = [
                load_layer(checkpoint, config, layer, device, self._shard) for layer in range(config.num_layers)
            ]
            self._load_ends(checkpoint)
        self._groups_of_plan: dict[LayerPlan, list[AnyLayerGroup]] = {}
        self._single_layers: dict[int, LayerGroup] = {}
        self._graphs: PassGraphs | None = None

    def _load_ends(self, checkpoint: TensorSource) -> None:
        c = self.config
        shape, token_ids = (c.vocab_size, c.hidden_size), self._shard.vocabulary(c.vocab_size)
        embeddings = checkpoint.tensor("model.embed_tokens.weight", shape)
        if c.tie_word_embeddings:
            head = embeddings[token_ids.start : token_ids.stop]
        else:
            head = checkpoint.tensor("lm_head.weight", shape, token_ids)
        # A short last share is filled up, so that all ranks' are equally large.
        head = functional.pad(head, (0, 0, 0, self._shard.vocabulary_share(c.vocab_size) - len(token_ids)))
        final_norm = checkpoint.tensor("model.norm.weight", (c.hidden_size,)).float()
        self._embeddings = embeddings.to(device=self.device, dtype=c.dtype)
        self._head = Linear((head.float() * final_norm).to(device=self.device, dtype=c.dtype))

    @property
    def num_parameters(self) -> int:
        """Weights without the norms that are folded into them, tied embeddings counted once."""
        tensors = [value for layer in self._layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        num_ends = self._embeddings.numel() * (1 if self.config.tie_word_embeddings else 2)
        return self._shard.size * sum(tensor.numel() for tensor in tensors) + num_ends

    def lay_out(self, segments: Sequence[Segment]) -> RowLayout:
        """The layout of an eager pass over `segments`."""
        return lay_out(segments, self.layer_config.num_queries_per_kv, self.device, is_flat=not self._is_exact)

    def arrange(self, segments: Sequence[Segment], plan: LayerPlan | None = None) -> PassLayout:
        """The layout of a pass by `plan`: that of a captured pass where one holds the segments, else an eager one."""
        captured = self._graphs.fitting(segments, plan or self.sequential_plan) if self._graphs is not None else None
        return captured or self.lay_out(segments)

    def capture(
        self, pool: KVPool, requests: Sequence[CaptureRequest], recorder: Recorder, limits: CaptureLimits
    ) -> CaptureReport:
        """Capture passes over `pool` for `arrange` to choose from; once, when products have their final form.

        Not for several ranks: a captured collective has to be replayed by all of them at once, and they learn of a
        pass one after the other (docs/decisions/0018).
        """
        assert self._ranks.size == 1, "one rank"
        dimensions = PassDimensions(
            max_model_len=min(self.config.max_model_len, pool.num_slots),
            num_queries_per_kv=self.config.num_queries_per_kv,
            hidden_size=self.config.hidden_size,
            dtype=self.config.dtype,
            is_flat=not self._is_exact,
        )

        def compute(layout: RowLayout, plan: LayerPlan) -> torch.Tensor:
            return self._compute(layout, pool, plan)

        self._graphs = PassGraphs(dimensions, self.device, compute, recorder)
        return self._graphs.capture(requests, limits)

    def forward(
        self,
        layout: PassLayout,
        pool: KVPool,
        plan: LayerPlan | None = None,
        logit_rows: Sequence[int] = (),
        choice_rows: SplitRows = NO_ROWS,
    ) -> torch.Tensor:
        """Run a pass: [T] tokens -> hidden states [T, E], final norm applied; writes K and V of every row.

        `logit_rows` announces what the next call of `logits` will ask for, which saves other ranks an order of its own;
        `choice_rows` what `choose` must be asked for after it.
        Of a captured pass, the hidden states are overwritten by the next pass.
        """
        plan = plan or self.sequential_plan
        self._lead(PassOrder(layout.segments, plan, tuple(logit_rows), choice_rows))
        self._announced_rows = tuple(logit_rows)
        if isinstance(layout, CapturedLayout):
            assert self._graphs is not None, "captured here"
            return self._graphs.run(layout, plan)
        return self._compute(layout, pool, plan)

    def _compute(self, layout: RowLayout, pool: KVPool, plan: LayerPlan) -> torch.Tensor:
        hidden, state = self._begin(layout, pool)
        for group in self._plan_groups(plan):
            hidden = group(hidden, state)
        return unit_rms(hidden, self.config.rms_norm_eps).to(self.config.dtype)

    def enter(self, layout: RowLayout, pool: KVPool) -> EnteredPass:
        """Begin a pass that is run in parts. On one rank only (`can_slice`)."""
        assert self.can_slice, "one rank"
        return EnteredPass(*self._begin(layout, pool))

    def forward_between(
        self, entered: EnteredPass, plan: LayerPlan, layers: range, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Part of a pass: `layers` alone, which begin and end at group borders of `plan`; writes their K and V.

        `hidden` [rows, E] is what the rows have come to at the entrance, None where it is the first layer. Returns
        what they come to at the exit, in the same form, without the final norm.
        """
        padding = 0 if hidden is None else len(entered.embedded) - len(hidden)
        hidden = entered.embedded if hidden is None else functional.pad(hidden, (0, 0, 0, padding))
        for group_layers, group in zip(plan.groups, self._plan_groups(plan), strict=True):
            if group_layers.start in layers:
                hidden = group(hidden, entered.state)
        return hidden[: sum(entered.state.layout.num_rows)]

    def exit_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head on hidden states [R, E] of any depth: float32 [R, V]."""
        hidden = unit_rms(hidden, self.config.rms_norm_eps).to(self.config.dtype)
        return self._head(hidden)[:, : self.config.vocab_size].float()

    @property
    def can_slice(self) -> bool:
        """Whether `forward_in_slices` is possible: several ranks compute whole passes, in the order they are told."""
        return self._ranks.size == 1

    def forward_in_slices(self, layout: RowLayout, pool: KVPool) -> Iterator[bool]:
        """The same pass layer by layer, for its K and V alone: each step computes one and says whether it was the last.

        Other passes may run in between, as long as they leave the slots of its rows alone.
        """
        assert self.can_slice, "one rank"
        hidden, state = self._begin(layout, pool)
        groups = self._plan_groups(self.sequential_plan)
        for group in groups:
            hidden = group(hidden, state)
            if self.device.type == "cuda":  # so that the caller's clock sees what the layer took
                torch.cuda.synchronize(self.device)
            yield group is groups[-1]

    def _begin(self, layout: RowLayout, pool: KVPool) -> tuple[torch.Tensor, PassState]:
        state = PassState(
            layout=layout,
            rotation=self._rotations[layout.positions].index_select(1, self._head_rotation)[:, None],
            pool=pool,
            read_entries=tuple(pool.entries(group.columns) for group in layout.groups),
            write_entries=pool.entries(layout.slots),
        )
        return self._embeddings[layout.token_ids], state

    def row_logits(
        self, layout: PassLayout, rows: Sequence[int], pool: KVPool, plan: LayerPlan | None = None
    ) -> torch.Tensor:
        """Run a pass as `forward` does and apply the head to some of its rows, at least one: float32 [R, V]."""
        return self.logits(self.forward(layout, pool, plan, rows), rows)

    def follow(self, pool: KVPool) -> None:
        """Compute this rank's part of the passes that rank 0 runs, until it leaves; raises EngineLostError."""
        hidden = torch.empty(0)
        while (order := decode_order(self._ranks.share(None))) is not Order.LEAVE:
            if isinstance(order, PassOrder):
                hidden = self.forward(self.lay_out(order.segments), pool, order.plan, order.logit_rows)
            if isinstance(order, PassOrder | HeadOrder) and order.logit_rows:
                self.logits(hidden, order.logit_rows)
            if isinstance(order, PassOrder) and order.choice_rows.rows:
                self.choose(hidden, order.choice_rows)

    def keep_followers(self) -> None:
        """Tell the other ranks that rank 0 lives, and learn that they do; raises EngineLostError. For idle times."""
        self._lead(Order.STAY)

    def dismiss_followers(self) -> None:
        """End the other ranks' `follow`."""
        self._lead(Order.LEAVE)

    def _lead(self, order: PassOrder | HeadOrder | Order) -> None:
        if self._ranks.size > 1 and self._ranks.rank == 0:
            self._ranks.share(encode_order(order))

    def logits(self, hidden: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Head: some rows, at least one, of the last pass's hidden states [T, E] -> float32 logits [R, V]."""
        announced, self._announced_rows = self._announced_rows, ()
        if announced:
            assert announced == tuple(rows), "what was announced comes first"
        elif self._shard.size > 1:
            self._lead(HeadOrder(tuple(rows)))
        logits = self._share_of_logits(hidden, rows)
        if self._shard.size > 1:
            logits = self._ranks.gather(logits).transpose(0, 1).flatten(1)  # [R, all shares]
        return logits[:, : self.config.vocab_size]

    @property
    def is_vocabulary_split(self) -> bool:
        """Whether ranks have a share of the head each, so that `choose` moves less than `logits`."""
        return self._shard.size > 1

    def choose(self, hidden: torch.Tensor, rows: SplitRows) -> torch.Tensor:
        """Tokens, int64, at rows of the last pass that were announced, on every rank; their logits stay where they are.

        Comes after `logits` of rows announced with the same pass.
        """
        own = self._shard.vocabulary(self.config.vocab_size)
        logits = self._share_of_logits(hidden, rows.rows)[:, : len(own)]
        return choose_split(logits, own.start, rows, self._ranks.gather)

    def _share_of_logits(self, hidden: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        num_rows = len(rows)
        hidden = hidden[to_device(rows, torch.int64, hidden.device)]
        if self._is_exact:
            # R is any number here, and products of few or odd row counts differ from others in their last bits.
            hidden = functional.pad(hidden, (0, 0, 0, bucket(num_rows) - num_rows))
        return self._head(hidden)[:num_rows].float()

    def linears(self) -> list[Linear]:
        """Every weight product of the sequential plan, the head included."""
        groups = [self._single_layer(layer) for layer in range(self.config.num_layers)]
        return [*(linear for group in groups for linear in group.linears), self._head]

    def _plan_groups(self, plan: LayerPlan) -> list[AnyLayerGroup]:
        """A plan's groups, built when it is first used; of those least recently used all but a few are dropped.

        A wide group holds its weights a second time, and clients choose plans: without a bound they could fill the
        memory. Groups of one layer are the same in every plan and stay; so do those of captured plans, whose replays
        read them.
        """
        groups = self._groups_of_plan.pop(plan, None)
        if groups is None:
            groups = [self._group(layers, plan.mlp) for layers in plan.groups]
        self._groups_of_plan[plan] = groups  # the last one is the most recently used
        dropped = [each for each in self._groups_of_plan if self._graphs is None or not self._graphs.has(each)]
        for each in dropped[: max(0, len(self._groups_of_plan) - MAX_PLANS)]:
            del self._groups_of_plan[each]
        return groups

    def _group(self, layers: range, mlp: MlpPlacement) -> AnyLayerGroup:
        weights: list[LayerWeights] = self._layers[layers.start : layers.stop]
        if len(layers) == 1:
            return self._single_layer(layers.start)
        if self._placement is RankPlacement.TENSOR or self._ranks.size == 1:
            return LayerGroup(self.layer_config, layers, weights, mlp, self._attention, self._ranks)
        if self._placement is RankPlacement.LAYERS_SHARDED_MLP:
            mlps = [sharded_mlp(self.config, layer, self._ranks) for layer in weights]
        else:
            mlps = [partial(self._single_layer(layer).mlp_output, 0) for layer in layers]
        return DistributedLayerGroup(self.config, layers, weights, mlp, self._attention, self._ranks, mlps)

    def _single_layer(self, layer: int) -> LayerGroup:
        """A layer by itself; where ranks share the layers of groups, each computes it whole."""
        if layer not in self._single_layers:
            ranks = self._ranks if self._placement is RankPlacement.TENSOR else SINGLE_RANK
            layers, weights = range(layer, layer + 1), [self._layers[layer]]
            single = LayerGroup(self.layer_config, layers, weights, MlpPlacement.SEQUENTIAL, self._attention, ranks)
            self._single_layers[layer] = single
        return self._single_layers[layer]
