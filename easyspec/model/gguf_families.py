"""What the metadata of llama.cpp's architectures says beside what all have, as fields of configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from easyspec.checkpoint.gguf_header import GgufHeader
from easyspec.model import tensor_names
from easyspec.model.tensor_names import TensorNames

Fields = dict[str, Any]


@dataclass(frozen=True)
class GgufFamily:
    """An architecture's model_type, names of tensors and settings.

    roles: llama.cpp's names of tensors in a layer that other architectures have not, or for other things. fields: of
    the configuration, given the size of heads; rope: of its rope_parameters. has_paired_rows: neighbouring dimensions
    of queries and keys turn against each other. adds_one: to the weights of norms.
    """

    model_type: str
    names: TensorNames = tensor_names.PLAIN
    roles: Mapping[str, str] = field(default_factory=dict)
    fields: Callable[[GgufHeader, int], Fields] = lambda header, head_dim: {}
    rope: Mapping[str, Any] = field(default_factory=dict)
    has_paired_rows: bool = False
    adds_one: bool = False


def _qwen3_moe(header: GgufHeader, head_dim: int) -> Fields:
    return {
        "num_experts": header.of_model("expert_count"),
        "num_experts_per_tok": header.of_model("expert_used_count"),
        "moe_intermediate_size": header.of_model("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _mixtral(header: GgufHeader, head_dim: int) -> Fields:
    return {
        "num_local_experts": header.of_model("expert_count"),
        "num_experts_per_tok": header.of_model("expert_used_count"),
    }


def _gpt_oss(header: GgufHeader, head_dim: int) -> Fields:
    return _mixtral(header, head_dim) | {
        "intermediate_size": header.of_model("expert_feed_forward_length"),
        "attention_bias": True,
    }


def _gemma(header: GgufHeader, head_dim: int) -> Fields:
    """Scores of the models of 27 B are scaled by another size than that of heads, which no field says."""
    is_largest = header.of_model("block_count") in (46, 62)
    size = header.of_model("embedding_length") // header.of_model("attention.head_count")
    return {
        "query_pre_attn_scalar": size if is_largest else head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": header.of_model("attn_logit_softcapping"),
        "final_logit_softcapping": header.of_model("final_logit_softcapping"),
    }


def _gemma3(header: GgufHeader, head_dim: int) -> Fields:
    whole: Fields = {"rope_type": "default", "rope_theta": float(header.of_model("rope.freq_base", 1e6))}
    if header.of_model("rope.scaling.type", "none") == "linear":
        whole |= {"rope_type": "linear", "factor": header.of_model("rope.scaling.factor")}
    near = {"rope_type": "default", "rope_theta": float(header.of_model("rope.freq_base_swa", 1e4))}
    return _gemma(header, head_dim) | {"rope_parameters": {"full_attention": whole, "sliding_attention": near}}


def _phi3(header: GgufHeader, head_dim: int) -> Fields:
    parameters: Fields = {
        "rope_type": "default",
        "rope_theta": float(header.of_model("rope.freq_base", 1e4)),
        "partial_rotary_factor": header.of_model("rope.dimension_count", head_dim) / head_dim,
    }
    fields: Fields = {"rope_parameters": parameters, "pad_token_id": None}
    if "rope_factors_short.weight" in header.tensors:
        original = header.of_model("rope.scaling.original_context_length")
        parameters |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        parameters |= {
            f"{kind}_factor": read_floats(header, f"rope_factors_{kind}.weight") for kind in ("short", "long")
        }
        if (factor := header.of_model("rope.scaling.attn_factor")) is not None:
            parameters["attention_factor"] = factor
        fields["original_max_position_embeddings"] = original
    return fields


def _starcoder2(header: GgufHeader, head_dim: int) -> Fields:
    return {
        "norm_epsilon": header.of_model("attention.layer_norm_epsilon"),
        "use_bias": "blk.0.attn_q.bias" in header.tensors,
        "hidden_act": "gelu_pytorch_tanh",
    }


def read_floats(header: GgufHeader, name: str) -> list[float]:
    """The float32 numbers of a tensor."""
    tensor = header.tensors[name]
    return [float(number) for number in np.fromfile(header.path, np.float32, tensor.shape[0], offset=tensor.offset)]


_GEMMA_ROLES = {"post_attention_norm": "attention_exit_norm", "post_ffw_norm": "mlp_exit_norm"}
GGUF_FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "llama": GgufFamily("llama", has_paired_rows=True),
        "mixtral": GgufFamily("mixtral", tensor_names.MIXTRAL, fields=_mixtral, has_paired_rows=True),
        "qwen2": GgufFamily("qwen2"),
        "qwen3": GgufFamily("qwen3"),
        "qwen3moe": GgufFamily("qwen3_moe", fields=_qwen3_moe),
        "gpt-oss": GgufFamily(
            "gpt_oss",
            tensor_names.GPT_OSS,
            roles={"post_attention_norm": "mlp_norm"},
            fields=_gpt_oss,
            rope={"truncate": False},
        ),
        "gemma2": GgufFamily("gemma2", tensor_names.GEMMA, roles=_GEMMA_ROLES, fields=_gemma, adds_one=True),
        "gemma3": GgufFamily("gemma3_text", tensor_names.GEMMA, roles=_GEMMA_ROLES, fields=_gemma3, adds_one=True),
        "phi3": GgufFamily("phi3", tensor_names.PHI3, roles={"ffn_up": "gate_up"}, fields=_phi3),
        "starcoder2": GgufFamily("starcoder2", tensor_names.STARCODER2, fields=_starcoder2),
    }
)


def family_of(header: GgufHeader) -> GgufFamily | None:
    """The family of a file; llama.cpp calls Mixtral a Llama with experts. None for one that is not read."""
    if header.architecture == "llama" and header.of_model("expert_count"):
        return GGUF_FAMILIES["mixtral"]
    return GGUF_FAMILIES.get(header.architecture)
