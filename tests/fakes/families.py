"""Small checkpoints of every family, with settings that make each of its peculiarities count.

Windows are shorter than the texts that tests read, and some layers have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_NO_PADDING = {"pad_token_id": 0}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + 0.5 * i for i in range(6)],
    "original_max_position_embeddings": 256,
}

FAMILY_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": {},
        "mistral": {"sliding_window": 40},
        "ministral3": {
            "head_dim": 16,
            "rope_parameters": {
                **_ROPE,
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 256,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
        "qwen2": {},
        "qwen3": {"head_dim": 32},
        "qwen3_moe": {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "mlp_only_layers": [1],
        },
        "gpt_oss": {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 40,
            "layer_types": _ALTERNATING,
            "rope_parameters": {
                **_ROPE,
                "rope_type": "yarn",
                "factor": 4.0,
                "truncate": False,
                "original_max_position_embeddings": 128,
            },
        },
        "gemma": {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"},
        "gemma2": {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 40,
            "layer_types": _ALTERNATING,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
        },
        "gemma3_text": {
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 40,
            "layer_types": _ALTERNATING,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": _ROPE,
            },
        },
        "phi3": {**_NO_PADDING, "sliding_window": 40},
        "olmo2": {},
        "olmo3": {"sliding_window": 40, "layer_types": _ALTERNATING},
        "smollm3": {**_NO_PADDING, "no_rope_layers": [1, 0, 1]},
        "granite": {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.5,
        },
        "glm4": {**_NO_PADDING, "head_dim": 16},
        "cohere2": {
            **_NO_PADDING,
            "sliding_window": 40,
            "layer_types": _ALTERNATING,
            "logit_scale": 0.75,
        },
        "seed_oss": {"head_dim": 16, "attention_out_bias": True},
        "hunyuan_v1_dense": {"head_dim": 16},
        "ernie4_5": {"head_dim": 16, "use_bias": True},
        "exaone4": {"sliding_window": 40, "layer_types": _ALTERNATING},
        "starcoder2": {"sliding_window": 40},
    }
)
# Further settings that a family has.
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "phi3, longrope, short texts": {
            "model_type": "phi3",
            **_NO_PADDING,
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 1024,
            "rope_parameters": _LONG_ROPE,
        },
        "qwen3_moe, normalised": {"model_type": "qwen3_moe", **FAMILY_OPTIONS["qwen3_moe"], "norm_topk_prob": True},
        "hunyuan_v1_dense, alpha": {
            "model_type": "hunyuan_v1_dense",
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0},
        },
        "granite, tied": {"model_type": "granite", **FAMILY_OPTIONS["granite"], "tie_word_embeddings": True},
    }
)
