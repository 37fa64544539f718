"""Configurations of the plainest families, read without transformers: importing a family's from there takes seconds and
80 MiB, in every process that loads a model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
)
# What a family's configuration is where neither a GGUF file nor a plain config.json has a word about it. Qwen's windows
# are switched off unless a field says otherwise.
_OF_FAMILY: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {"hidden_act": "silu"},
        "qwen2": {"hidden_act": "silu", "sliding_window": None},
        "qwen3": {"hidden_act": "silu", "sliding_window": None},
    }
)
# The size of heads by default; None: that of the hidden state shared among them.
_HEAD_DIMS: Mapping[str, int | None] = MappingProxyType({"llama": None, "qwen2": None, "qwen3": 128})
_TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "rms_norm_eps": (float,),
        "tie_word_embeddings": (bool,),
        "eos_token_id": (int, list, type(None)),
        "hidden_act": (str,),
        "attention_bias": (bool,),
        "mlp_bias": (bool,),
        "quantization_config": (dict, type(None)),
    }
)
# torch has other names for some of them: half, float.
_DTYPES = ("float32", "bfloat16", "float16", None)
_LAYER_TYPES = ("full_attention", "sliding_attention")
# With these, what matters is also said elsewhere.
_ELSEWHERE = ("auto_map", "configuration_files", "per_layer_config")
_STATED = ("rms_norm_eps", "tie_word_embeddings", "eos_token_id", "hidden_act")


def plain_gguf_config(model_type: str, fields: Mapping[str, Any]) -> Any | None:
    """What transformers' configuration of the `fields` of a GGUF file would say; None where only it can tell."""
    if model_type not in _OF_FAMILY or fields["rope_parameters"]["rope_type"] != "default":
        return None
    return SimpleNamespace(model_type=model_type, **{**fields, **_OF_FAMILY[model_type]})


def plain_json_config(fields: Mapping[str, Any]) -> Any | None:
    """The same of a config.json. None also where a field that matters is missing, or wrong: transformers has defaults
    for the one and words for the other."""
    defaults, rope = _OF_FAMILY.get(fields["model_type"]), _plain_rope(fields)
    if defaults is None or rope is None or not _is_plain(fields):
        return None
    own = {
        "head_dim": _head_dim(fields),
        "dtype": fields.get("dtype") or fields.get("torch_dtype"),
        "rope_parameters": rope,
    }
    return SimpleNamespace(**{**fields, **defaults, **own})


def _is_plain(fields: Mapping[str, Any]) -> bool:
    return (
        all(type(fields.get(name)) is int and fields[name] > 0 for name in _COUNTS)
        and fields["hidden_size"] % fields["num_attention_heads"] == 0
        and all(name in fields for name in _STATED)
        and all(type(fields[name]) in types for name, types in _TYPES.items() if name in fields)
        and fields["hidden_act"] == "silu"
        and fields.get("use_sliding_window", False) is False
        and all(fields.get(name) in _DTYPES for name in ("dtype", "torch_dtype"))
        and _has_plain_heads(fields)
        and _has_plain_layers(fields)
        and not any(name in fields for name in _ELSEWHERE)
    )


def _has_plain_heads(fields: Mapping[str, Any]) -> bool:
    """Whether rotary embeddings can turn them: in pairs."""
    head_dim = _head_dim(fields)
    return type(head_dim) is int and head_dim > 0 and head_dim % 2 == 0


def _head_dim(fields: Mapping[str, Any]) -> Any:
    default = _HEAD_DIMS[fields["model_type"]]
    if default is None and fields.get("head_dim") is None:
        return fields["hidden_size"] // fields["num_attention_heads"]
    return fields.get("head_dim", default)


def _has_plain_layers(fields: Mapping[str, Any]) -> bool:
    types = fields.get("layer_types")
    return types is None or (
        isinstance(types, list)
        and len(types) == fields["num_hidden_layers"]
        and all(layer_type in _LAYER_TYPES for layer_type in types)
    )


def _plain_rope(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The parameters of ordinary rotary embeddings, None for others."""
    if fields.get("rope_scaling") is not None:  # transformers heeds it before `rope_parameters`
        return None
    stated = fields.get("rope_parameters")
    if stated is None:
        stated = {"rope_type": "default", "rope_theta": fields.get("rope_theta")}
    if not isinstance(stated, dict) or stated.keys() != {"rope_type", "rope_theta"}:
        return None
    is_ordinary = stated["rope_type"] == "default" and type(stated["rope_theta"]) in (int, float)
    return stated if is_ordinary else None
