"""The decoder: embeddings, layer groups, final norm and head.

Dimensions: `T` rows of a pass, `E` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional

from easyspec.model.attention import AttentionFunction, blockwise_attention, flat_attention
from easyspec.model.config import ModelConfig
from easyspec.model.kv_cache import KVPool
from easyspec.model.layers import LayerGroup, LayerWeights, PassState, load_layer, unit_rms
from easyspec.model.linear import Linear
from easyspec.model.rope import rotation_table
from easyspec.model.row_layout import RowLayout, Segment, bucket, lay_out
from easyspec.model.weights import Checkpoint
from easyspec.parallel.layer_groups import LayerPlan, sequential_plan
from easyspec.speculation.parameters import MlpPlacement

# Layer plans whose wide groups are kept ready; the sequential plan counts as one and costs nothing.
MAX_PLANS = 4


class Decoder:
    """A model of the Llama family over a KV pool, executed by a layer plan.

    `is_exact` chooses the attention whose bits for a row do not depend on the other rows (the base model needs
    it, a draft does not). Not thread-safe: one thread owns the device.
    """

    def __init__(self, folder: Path, config: ModelConfig, device: torch.device, *, is_exact: bool) -> None:
        """Raises ConfigurationError for a missing or corrupt checkpoint."""
        self.config = config
        self.device = device
        self.sequential_plan = sequential_plan(config.num_layers)
        self._is_exact = is_exact
        self._attention: AttentionFunction = blockwise_attention if is_exact else flat_attention
        rotations = rotation_table(config, device)[:, None]
        self._rotations = torch.cat([rotations, torch.ones_like(rotations)], dim=1)  # [positions, 2, D / 2]
        kinds = [0] * config.num_heads + [0, 1] * config.num_kv_heads  # queries and keys are turned, values are not
        self._head_rotation = torch.tensor(kinds, device=device)
        with Checkpoint(folder) as checkpoint:
            self._layers = [load_layer(checkpoint, config, layer, device) for layer in range(config.num_layers)]
            self._load_ends(checkpoint)
        self._groups_of_plan: dict[LayerPlan, list[LayerGroup]] = {}
        self._single_layers: dict[int, LayerGroup] = {}

    def _load_ends(self, checkpoint: Checkpoint) -> None:
        c = self.config
        shape = (c.vocab_size, c.hidden_size)
        embeddings = checkpoint.tensor("model.embed_tokens.weight", shape)
        head = embeddings if c.tie_word_embeddings else checkpoint.tensor("lm_head.weight", shape)
        final_norm = checkpoint.tensor("model.norm.weight", (c.hidden_size,)).float()
        self._embeddings = embeddings.to(device=self.device, dtype=c.dtype)
        self._head = Linear((head.float() * final_norm).to(device=self.device, dtype=c.dtype))

    @property
    def num_parameters(self) -> int:
        """Weights without the norms that are folded into them, tied embeddings counted once."""
        tensors = [value for layer in self._layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
        num_ends = self._embeddings.numel() * (1 if self.config.tie_word_embeddings else 2)
        return sum(tensor.numel() for tensor in tensors) + num_ends

    def lay_out(self, segments: Sequence[Segment]) -> RowLayout:
        """The layout of a pass over `segments`."""
        return lay_out(segments, self.config.num_queries_per_kv, self.device, is_flat=not self._is_exact)

    def forward(self, layout: RowLayout, pool: KVPool, plan: LayerPlan | None = None) -> torch.Tensor:
        """Run a pass: [T] tokens -> hidden states [T, E], final norm applied; writes K and V of every row."""
        state = PassState(
            layout=layout,
            rotation=self._rotations[layout.positions].index_select(1, self._head_rotation)[:, None],
            pool=pool,
            read_entries=tuple(pool.entries(group.columns) for group in layout.groups),
            write_entries=pool.entries(layout.slots),
        )
        hidden = self._embeddings[layout.token_ids]
        for group in self._plan_groups(plan or self.sequential_plan):
            hidden = group(hidden, state)
        return unit_rms(hidden, self.config.rms_norm_eps).to(self.config.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Head: hidden states [R, E] -> float32 logits [R, V]."""
        if not self._is_exact:
            return self._head(hidden).float()
        # R is any number here, and products of few or odd row counts differ from others in their last bits.
        num_rows = hidden.shape[0]
        padded = functional.pad(hidden, (0, 0, 0, bucket(num_rows) - num_rows))
        return self._head(padded)[:num_rows].float()

    def linears(self) -> list[Linear]:
        """Every weight product of the sequential plan, the head included."""
        groups = self._plan_groups(self.sequential_plan)
        return [*(linear for group in groups for linear in group.linears), self._head]

    def _plan_groups(self, plan: LayerPlan) -> list[LayerGroup]:
        """A plan's groups, built when it is first used; of those least recently used all but a few are dropped.

        A wide group holds its weights a second time, and clients choose plans: without a bound they could fill the
        memory. Groups of one layer are the same in every plan and stay.
        """
        groups = self._groups_of_plan.pop(plan, None)
        if groups is None:
            groups = [self._group(layers, plan.mlp) for layers in plan.groups]
        self._groups_of_plan[plan] = groups  # the last one is the most recently used
        while len(self._groups_of_plan) > MAX_PLANS:
            del self._groups_of_plan[next(iter(self._groups_of_plan))]
        return groups

    def _group(self, layers: range, mlp: MlpPlacement) -> LayerGroup:
        weights: list[LayerWeights] = self._layers[layers.start : layers.stop]
        if len(layers) > 1:
            return LayerGroup(self.config, layers, weights, mlp, self._attention)
        if layers.start not in self._single_layers:
            single = LayerGroup(self.config, layers, weights, MlpPlacement.SEQUENTIAL, self._attention)
            self._single_layers[layers.start] = single
        return self._single_layers[layers.start]
