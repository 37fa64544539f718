"""What the layers of a decoder compute: one frozen description a layer, which knows nothing of families.

`easyspec/model/model_families.py` reads it from a configuration, `easyspec/model/layer_weights.py` reads weights by it,
`easyspec/model/layers.py` writes programs by it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from easyspec.ops.program import Activation


class NormKind(enum.Enum):
    """LAYER is centred; OFFSET is RMS whose stored weights are less one."""

    RMS = "rms"
    OFFSET = "offset"
    LAYER = "layer"


@dataclass(frozen=True)
class NormSpec:
    """A norm over the hidden state."""

    eps: float
    kind: NormKind = NormKind.RMS
    has_bias: bool = False


class HeadNorm(enum.Enum):
    """What queries and keys are normed over: each head by itself, or all heads of a row together."""

    NONE = "none"
    HEADS = "heads"
    ROWS = "rows"


@dataclass(frozen=True)
class RotarySpec:
    """Which dimensions of a head turn, and by which angles.

    dim: how many, from the first on. layer_type: whose `rope_parameters`, where layers have several. is_interleaved:
    neighbours turn against each other in the checkpoint; its rows are put in another order when they are read.
    """

    dim: int
    layer_type: str | None = None
    is_interleaved: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """scale: of queries; rotary None: positions are not told apart; window: positions that a row sees, None for all."""

    scale: float
    rotary: RotarySpec | None
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    head_norm: HeadNorm = HeadNorm.NONE
    is_norm_last: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False


@dataclass(frozen=True)
class MlpSpec:
    """One MLP of `size`; without a gate the activation is of its inner values."""

    size: int
    activation: Activation = Activation.SILU
    is_gated: bool = True
    has_bias: bool = False


@dataclass(frozen=True)
class ExpertsSpec:
    """`num_chosen` of `num_experts` gated MLPs of `size` for each row; see `easyspec.ops.program.Route`."""

    size: int
    num_experts: int
    num_chosen: int
    is_normalised: bool
    activation: Activation = Activation.SILU
    has_bias: bool = False
    has_router_bias: bool = False


class NormPlace(enum.Enum):
    """Where attention and MLP have norms. PARALLEL: one before both, which read the same hidden state."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    PARALLEL = "parallel"

    @property
    def has_entrance(self) -> bool:
        return self is not NormPlace.AFTER

    @property
    def has_exit(self) -> bool:
        return self in (NormPlace.AFTER, NormPlace.AROUND)

    @property
    def is_parallel(self) -> bool:
        return self is NormPlace.PARALLEL


@dataclass(frozen=True)
class LayerSpec:
    """One layer: hidden += residual_factor * attention(hidden), then the same with its MLP."""

    attention: AttentionSpec
    mlp: MlpSpec | ExpertsSpec
    norm: NormSpec
    norms: NormPlace = NormPlace.BEFORE
    residual_factor: float = 1.0


@dataclass(frozen=True)
class ModelSpec:
    """All layers, and the ends: embeddings are multiplied, logits too and then capped."""

    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    embedding_factor: float = 1.0
    logit_factor: float = 1.0
    logit_soft_cap: float | None = None

    @property
    def rotaries(self) -> frozenset[RotarySpec]:
        return frozenset(layer.attention.rotary for layer in self.layers if layer.attention.rotary is not None)
