"""EasySpec's layer parallelism over ranks: in each group every rank runs the attention of its own layers.

Dimensions: `T` rows of the pass, `N` layers in the group, `R` ranks, `E` hidden size.

One all-gather a group returns all A_i. The MLPs then run one after the other, on every rank alike (replicated) or each
split over the ranks (sharded, one sum a layer), or all at once where their layer lives (staged, one sum a group). Every
rank keeps the weights of all layers, so that the exact pass needs no collective at all and leaves exact keys and values
everywhere (docs/decisions/0015).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence

import torch

from easyspec.model.attention import AttentionFunction
from easyspec.model.config import ModelConfig
from easyspec.model.layers import LayerGroup, LayerWeights, PassState, mlp_shard
from easyspec.parallel.ranks import Ranks
from easyspec.parallel.shard import Shard
from easyspec.speculation.parameters import MlpPlacement


class RankPlacement(enum.Enum):
    """What ranks share: every layer (tensor parallelism), or the layers of each group (layer parallelism).

    With LAYERS, sequential MLPs are computed by all ranks alike, with LAYERS_SHARDED_MLP each is split over them.
    """

    TENSOR = "tensor"
    LAYERS = "layers"
    LAYERS_SHARDED_MLP = "layers-sharded-mlp"


Mlp = Callable[[torch.Tensor], torch.Tensor]


def own_layers(num_layers: int, ranks: Ranks) -> range:
    """Which of a group's layers this rank owns: equal runs of consecutive layers, the last ones short or empty."""
    most = most_layers(num_layers, ranks.size)
    return range(min(ranks.rank * most, num_layers), min((ranks.rank + 1) * most, num_layers))


def most_layers(num_layers: int, num_ranks: int) -> int:
    """Layers on the busiest rank."""
    return -(-num_layers // num_ranks)


class DistributedLayerGroup:
    """A group of several layers over ranks; `mlps` are the MLPs of all its layers, for the sequential placement."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        weights: Sequence[LayerWeights],
        mlp: MlpPlacement,
        attention: AttentionFunction,
        ranks: Ranks,
        mlps: Sequence[Mlp],
    ) -> None:
        self._ranks = ranks
        self._num_layers = len(layers)
        self._most_layers = most_layers(len(layers), ranks.size)
        self._own = own_layers(len(layers), ranks)
        self._is_staged = mlp is MlpPlacement.STAGED
        self._mlps = mlps
        self._group: LayerGroup | None = None
        if self._own:
            own = layers[self._own.start : self._own.stop]
            self._group = LayerGroup(config, own, weights[self._own.start : self._own.stop], mlp, attention)

    def __call__(self, hidden: torch.Tensor, state: PassState) -> torch.Tensor:
        """[T, E] -> [T, E]; writes keys and values of this rank's layers into its pool."""
        parts = hidden.new_zeros(self._most_layers, *hidden.shape)
        if self._group is not None:
            parts[: len(self._own)] = self._group.attention_outputs(hidden, state)
        gathered = self._ranks.gather(parts)  # [R, N / R, T, E]
        outputs = gathered.flatten(0, 1)[: self._num_layers]  # [N, T, E]: only the last ranks' parts are short
        if self._is_staged:
            return self._staged(hidden + outputs.cumsum(dim=0))
        for output, mlp in zip(outputs, self._mlps, strict=True):
            hidden = hidden + output
            hidden = hidden + mlp(hidden)
        return hidden

    def _staged(self, residuals: torch.Tensor) -> torch.Tensor:
        part = torch.zeros_like(residuals[0])
        if self._group is not None:
            own = residuals[self._own.start : self._own.stop]
            part = self._group.staged_mlp_outputs(own).sum(dim=0)
        return residuals[-1] + self._ranks.sum(part)


def sharded_mlp(config: ModelConfig, weights: LayerWeights, ranks: Ranks) -> Mlp:
    """One layer's MLP split over the ranks: one sum."""
    part = mlp_shard(config, weights, Shard(ranks.rank, ranks.size))
    return lambda hidden: ranks.sum(part(hidden))
