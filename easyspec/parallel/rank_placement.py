"""What the ranks of one model share."""

from __future__ import annotations

import enum


class RankPlacement(enum.Enum):
    """Every layer (tensor parallelism), or the layers of each group (layer parallelism).

    With LAYERS, sequential MLPs are computed by all ranks alike, with LAYERS_SHARDED_MLP each is split over them.
    """

    TENSOR = "tensor"
    LAYERS = "layers"
    LAYERS_SHARDED_MLP = "layers-sharded-mlp"
