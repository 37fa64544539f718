"""Families of models: what each computes, read from its configuration as a `ModelSpec`.

A family is a row of FAMILIES: how it differs from Llama, as values or as functions of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from easyspec.errors import ConfigurationError
from easyspec.model import tensor_names
from easyspec.model.layer_spec import (
    AttentionSpec,
    ExpertsSpec,
    HeadNorm,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    NormKind,
    NormPlace,
    NormSpec,
    RotarySpec,
)
from easyspec.model.tensor_names import TensorNames
from easyspec.ops.program import Activation

_ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": Activation.SILU,
        "swish": Activation.SILU,
        "gelu_pytorch_tanh": Activation.GELU_TANH,
        "gelu_new": Activation.GELU_TANH,
    }
)
_SLIDING, _FULL = "sliding_attention", "full_attention"
# What gpt-oss's experts are trained with; other values are refused.
_SWIGLU = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}

OfLayer = Callable[[Any, int, bool], bool]


def _field(name: str) -> Callable[[Any], bool]:
    return lambda hf: bool(getattr(hf, name, False))


def _never(hf: Any) -> bool:
    return False


def _one(hf: Any) -> float:
    return 1.0


def _root_of_size(hf: Any) -> float:
    """What Gemma multiplies embeddings by, in the type of its weights."""
    name = str(hf.dtype or "float32").removeprefix("torch.")
    rounded: float = torch.tensor(hf.hidden_size**0.5, dtype=getattr(torch, name, torch.float32)).item()
    return rounded


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama. `settings`: what it understands of the fields that other families must not have.

    has_rotary: of a layer by its number and whether it has a window. counts_scaled_positions: the configuration's
    number of positions is that after scaling, whatever the type of scaling.
    """

    names: TensorNames = tensor_names.PLAIN
    settings: frozenset[str] = frozenset()
    norm: NormKind = NormKind.RMS
    norm_eps: str = "rms_norm_eps"
    has_norm_bias: bool = False
    norms: NormPlace = NormPlace.BEFORE
    head_norm: HeadNorm = HeadNorm.NONE
    is_norm_last: bool = False
    is_interleaved: bool = False
    has_rotary: OfLayer = lambda hf, layer, is_sliding: True
    has_qkv_bias: Callable[[Any], bool] = _never
    has_output_bias: Callable[[Any], bool] = _never
    has_mlp_bias: Callable[[Any], bool] = _never
    is_gated: bool = True
    activation: str = "hidden_act"
    query_scale: Callable[[Any], float] = lambda hf: float(head_dim(hf) ** -0.5)
    has_sinks: bool = False
    experts: Callable[[Any, int], ExpertsSpec | None] = lambda hf, layer: None
    embedding_factor: Callable[[Any], float] = _one
    residual_factor: Callable[[Any], float] = _one
    logit_factor: Callable[[Any], float] = _one
    counts_scaled_positions: bool = False


def _biased(field: str = "attention_bias", **others: Any) -> Family:
    """One whose configuration says in a field whether attention's products have biases."""
    return Family(**{"has_qkv_bias": _field(field), "has_output_bias": _field(field), **others})


def _qwen3_experts(hf: Any, layer: int) -> ExpertsSpec | None:
    if layer in (hf.mlp_only_layers or []) or hf.num_experts == 0 or (layer + 1) % hf.decoder_sparse_step != 0:
        return None
    return ExpertsSpec(
        hf.moe_intermediate_size, hf.num_experts, hf.num_experts_per_tok, bool(hf.norm_topk_prob), _activation(hf)
    )


def _mixtral_experts(hf: Any, layer: int) -> ExpertsSpec:
    return ExpertsSpec(
        hf.intermediate_size,
        hf.num_local_experts,
        hf.num_experts_per_tok,
        is_normalised=True,
        activation=_activation(hf),
    )


def _gpt_oss_experts(hf: Any, layer: int) -> ExpertsSpec:
    for name, value in _SWIGLU.items():
        if getattr(hf, name, value) != value:
            raise ConfigurationError(f"{name} is {getattr(hf, name)!r}; supported: {value}")
    return ExpertsSpec(
        hf.intermediate_size,
        hf.num_local_experts,
        hf.num_experts_per_tok,
        is_normalised=True,
        activation=Activation.CLAMPED_SWIGLU,
        has_bias=True,
        has_router_bias=True,
    )


_EXPERTS = frozenset({"num_experts", "num_local_experts"})
_CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"})
_PARTIAL = frozenset({"partial_rotary_factor"})
_GEMMA = _biased(
    names=tensor_names.GEMMA,
    settings=_CAPS,
    norm=NormKind.OFFSET,
    norms=NormPlace.AROUND,
    activation="hidden_activation",
    query_scale=lambda hf: float(hf.query_pre_attn_scalar) ** -0.5,
    embedding_factor=_root_of_size,
    counts_scaled_positions=True,
)
_OLMO = _biased(names=tensor_names.AFTER, norms=NormPlace.AFTER, head_norm=HeadNorm.ROWS)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": _biased(has_mlp_bias=_field("mlp_bias")),
        "mistral": Family(),
        "ministral3": Family(),
        "qwen2": Family(has_qkv_bias=lambda hf: True),
        "qwen3": _biased(head_norm=HeadNorm.HEADS),
        "qwen3_moe": _biased(settings=_EXPERTS, head_norm=HeadNorm.HEADS, experts=_qwen3_experts),
        "mixtral": Family(names=tensor_names.MIXTRAL, settings=_EXPERTS, experts=_mixtral_experts),
        "gpt_oss": _biased(names=tensor_names.GPT_OSS, settings=_EXPERTS, has_sinks=True, experts=_gpt_oss_experts),
        "gemma": _biased(norm=NormKind.OFFSET, embedding_factor=_root_of_size),
        "gemma2": _GEMMA,
        "gemma3_text": replace(_GEMMA, head_norm=HeadNorm.HEADS),
        "phi3": Family(names=tensor_names.PHI3, settings=_PARTIAL),
        "olmo2": _OLMO,
        "olmo3": _OLMO,
        "smollm3": _biased(
            settings=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
            has_mlp_bias=_field("mlp_bias"),
            has_rotary=lambda hf, layer, is_sliding: bool(hf.no_rope_layers[layer]),
        ),
        "granite": _biased(
            settings=frozenset({"embedding_multiplier", "residual_multiplier", "attention_multiplier"})
            | {"logits_scaling"},
            has_mlp_bias=_field("mlp_bias"),
            query_scale=lambda hf: float(hf.attention_multiplier),
            embedding_factor=lambda hf: float(hf.embedding_multiplier),
            residual_factor=lambda hf: float(hf.residual_multiplier),
            logit_factor=lambda hf: 1.0 / float(hf.logits_scaling),
        ),
        "glm4": Family(
            names=tensor_names.GLM4,
            settings=_PARTIAL,
            norms=NormPlace.AROUND,
            is_interleaved=True,
            has_qkv_bias=_field("attention_bias"),
        ),
        "cohere2": _biased(
            settings=frozenset({"logit_scale"}),
            norm=NormKind.LAYER,
            norm_eps="layer_norm_eps",
            norms=NormPlace.PARALLEL,
            is_interleaved=True,
            has_rotary=lambda hf, layer, is_sliding: is_sliding,
            logit_factor=lambda hf: float(hf.logit_scale),
        ),
        "seed_oss": _biased(has_output_bias=_field("attention_out_bias"), has_mlp_bias=_field("mlp_bias")),
        "hunyuan_v1_dense": _biased(names=tensor_names.HUNYUAN, head_norm=HeadNorm.HEADS, is_norm_last=True),
        "ernie4_5": _biased("use_bias", is_interleaved=True, has_mlp_bias=_field("use_bias")),
        "exaone4": Family(
            names=tensor_names.AFTER,
            norms=NormPlace.AFTER,
            head_norm=HeadNorm.HEADS,
            has_rotary=lambda hf, layer, is_sliding: hf.sliding_window is None or is_sliding,
        ),
        "starcoder2": _biased(
            "use_bias",
            names=tensor_names.STARCODER2,
            norm=NormKind.LAYER,
            norm_eps="norm_epsilon",
            has_norm_bias=True,
            is_gated=False,
            has_mlp_bias=_field("use_bias"),
        ),
    }
)


def model_spec(hf: Any, windows: tuple[int | None, ...]) -> ModelSpec:
    """What the model of a configuration computes; `windows` of its layers.

    Raises ConfigurationError for an activation or an expert that is not computed.
    """
    family = FAMILIES[hf.model_type]
    norm = NormSpec(float(getattr(hf, family.norm_eps)), family.norm, family.has_norm_bias)
    layers = tuple(
        LayerSpec(
            attention=_attention(hf, family, layer, window),
            mlp=family.experts(hf, layer)
            or MlpSpec(hf.intermediate_size, _activation(hf), family.is_gated, family.has_mlp_bias(hf)),
            norm=norm,
            norms=family.norms,
            residual_factor=family.residual_factor(hf),
        )
        for layer, window in enumerate(windows)
    )
    soft_cap = getattr(hf, "final_logit_softcapping", None)
    return ModelSpec(layers, norm, family.embedding_factor(hf), family.logit_factor(hf), soft_cap)


def _attention(hf: Any, family: Family, layer: int, window: int | None) -> AttentionSpec:
    types = getattr(hf, "layer_types", None)
    is_sliding = types[layer] == _SLIDING if types else window is not None
    rotary = None
    if family.has_rotary(hf, layer, is_sliding):
        layer_type = types[layer] if types else None
        share = rope_parameters(hf, layer_type).get("partial_rotary_factor") or 1.0
        own_type = layer_type if has_rope_by_layer_type(hf) else None
        rotary = RotarySpec(int(head_dim(hf) * share), own_type, family.is_interleaved)
    return AttentionSpec(
        scale=family.query_scale(hf),
        rotary=rotary,
        window=window,
        soft_cap=getattr(hf, "attn_logit_softcapping", None),
        has_sinks=family.has_sinks,
        head_norm=family.head_norm,
        is_norm_last=family.is_norm_last,
        has_qkv_bias=family.has_qkv_bias(hf),
        has_output_bias=family.has_output_bias(hf),
    )


def _activation(hf: Any) -> Activation:
    name = getattr(hf, FAMILIES[hf.model_type].activation)
    if name not in _ACTIVATIONS:
        raise ConfigurationError(f"hidden_act is {name!r}; supported: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def head_dim(hf: Any) -> int:
    return int(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)


def has_rope_by_layer_type(hf: Any) -> bool:
    """Whether layers with and without windows turn by angles of their own."""
    return any(name in hf.rope_parameters for name in (_SLIDING, _FULL))


def rope_parameters(hf: Any, layer_type: str | None = None) -> Mapping[str, Any]:
    """The parameters of a type of layer, by default of the layers that see the whole text."""
    if not has_rope_by_layer_type(hf):
        return dict(hf.rope_parameters)
    return dict(hf.rope_parameters.get(layer_type or _FULL) or next(iter(hf.rope_parameters.values())))
