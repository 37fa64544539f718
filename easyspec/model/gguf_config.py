"""A Hugging Face configuration from the metadata of a GGUF file.

transformers reads one too, and leaves out what some files say: the size of heads, scaled positions, windows. What
none of the supported families computes is handed on under its Hugging Face name, so that it is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from easyspec.checkpoint.gguf_header import GgufHeader
from easyspec.errors import ConfigurationError
from easyspec.model.gguf_blocks import FLOAT_TYPES, format_name
from easyspec.model.gguf_families import family_of, read_floats
from easyspec.model.plain_config import plain_gguf_config
from easyspec.model.supported_models import GGUF_MODEL_TYPES

_EMBEDDINGS, _HEAD, _FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
# Our own key; other readers of the format ignore it, and have rows of the head that were not trained.
DRAFT_VOCABULARY = "easyspec.draft_vocabulary"
_HANDED_ON: Mapping[str, str] = MappingProxyType(
    {
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "attention.scale": "attention_multiplier",
        "logit_scale": "logit_scale",
    }
)


def config_of(header: GgufHeader) -> Any:
    """The configuration of the model in the file; raises ConfigurationError for what is missing or unsupported."""
    family = family_of(header)
    if family is None:
        raise ConfigurationError(
            f"general.architecture is {header.architecture!r} in {header.path}; supported: "
            f"{', '.join(GGUF_MODEL_TYPES)}"
        )
    num_heads, hidden_size = _count(header, "attention.head_count"), _count(header, "embedding_length")
    if _EMBEDDINGS not in header.tensors:
        raise ConfigurationError(f"no tensor {_EMBEDDINGS!r} in {header.path}")
    head_dim = header.of_model("attention.key_length", hidden_size // num_heads)
    if header.of_model("attention.value_length", head_dim) != head_dim:
        raise ConfigurationError(f"keys and values of {header.path} have heads of different sizes; supported: equal")
    handed_on = {name: value for key, name in _HANDED_ON.items() if (value := header.of_model(key)) is not None}
    if (token_ids := header.metadata.get(DRAFT_VOCABULARY)) is not None:
        handed_on["draft_vocabulary"] = list(token_ids)
    if (num_rotated := header.of_model("rope.dimension_count", head_dim)) != head_dim:
        handed_on["partial_rotary_factor"] = num_rotated / head_dim
    fields = {
        "vocab_size": header.tensors[_EMBEDDINGS].shape[0],
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(header, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": header.of_model("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": _count(header, "feed_forward_length"),
        "max_position_embeddings": _count(header, "context_length"),
        "rms_norm_eps": header.of_model("attention.layer_norm_rms_epsilon", 1e-5),
        "tie_word_embeddings": _HEAD not in header.tensors,
        "attention_bias": "blk.0.attn_output.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in header.tensors,
        "bos_token_id": None,
        "eos_token_id": list(header.end_token_ids) or None,
        "dtype": _dtype(header),
        "rope_parameters": {**_rope_parameters(header), **family.rope},
        **handed_on,
        **family.fields(header, head_dim),
    }
    config = _configuration(header, family.model_type, fields)
    if (tensor := header.tensors.get(_FREQUENCIES)) is not None:
        # What each frequency is divided by: Llama 3's scaling, written out by the converter.
        if tensor.shape != (head_dim // 2,) or format_name(tensor.kind) != "F32":
            raise ConfigurationError(
                f"{_FREQUENCIES!r} in {header.path} is {format_name(tensor.kind)} of shape {tensor.shape}; "
                f"expected F32 of ({head_dim // 2},)"
            )
        config.rope_parameters["frequency_factors"] = read_floats(header, _FREQUENCIES)
    return config


def _configuration(header: GgufHeader, model_type: str, fields: dict[str, Any]) -> Any:
    if (plain := plain_gguf_config(model_type, fields)) is not None:
        return plain
    from transformers import AutoConfig  # for other families alone

    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # a wrong value raises whatever transformers first trips over
        raise ConfigurationError(f"no usable metadata in {header.path}: {error}") from error


def _count(header: GgufHeader, key: str) -> int:
    value = header.of_model(key)
    if type(value) is not int or value < 1:
        raise ConfigurationError(
            f"{header.architecture}.{key} is {value!r} in {header.path}; allowed: a number, the same in all layers"
        )
    return value


def _rope_parameters(header: GgufHeader) -> dict[str, Any]:
    parameters = {"rope_type": "default", "rope_theta": float(header.of_model("rope.freq_base", 10_000.0))}
    scaling = header.of_model("rope.scaling.type", "none")
    if scaling == "none":
        return parameters
    parameters |= {"rope_type": scaling, "factor": header.of_model("rope.scaling.factor", 1.0)}
    original = header.of_model("rope.scaling.original_context_length")
    return parameters if original is None else parameters | {"original_max_position_embeddings": original}


def _dtype(header: GgufHeader) -> str:
    """The type that the file's matrices have, float32 where they are quantized."""
    kinds = {format_name(tensor.kind) for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return FLOAT_TYPES.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"
