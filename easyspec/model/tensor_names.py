"""What the tensors of a family are called in Hugging Face checkpoints, by what they are for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorNames:
    """Names of modules inside a layer, without `.weight` or `.bias`; `qkv` and `gate_up`: where several are one matrix.

    `expert`: the stem of an expert's matrices, with its number; sinks, which are not a module, have their whole name.
    """

    input_norm: str = "input_layernorm"
    attention_exit_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_exit_norm: str = ""
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    qkv: str | None = None
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    output: str = "self_attn.o_proj"
    sinks: str = "self_attn.sinks"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gate_up: str | None = None
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{number}"
    expert_gate: str = "gate_proj"
    expert_up: str = "up_proj"
    expert_down: str = "down_proj"

    def of_expert(self, number: int, part: str) -> str:
        """The name of an expert's matrix, `part` being one of expert_gate, expert_up and expert_down."""
        return f"{self.expert.format(number=number)}.{part}"


PLAIN = TensorNames()
# Norms behind attention and MLP, and none before them.
AFTER = TensorNames(
    attention_exit_norm="post_attention_layernorm", mlp_norm="", mlp_exit_norm="post_feedforward_layernorm"
)
GEMMA = TensorNames(
    attention_exit_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_exit_norm="post_feedforward_layernorm",
)
GLM4 = TensorNames(
    attention_exit_norm="post_self_attn_layernorm", mlp_exit_norm="post_mlp_layernorm", gate_up="mlp.gate_up_proj"
)
PHI3 = TensorNames(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj")
HUNYUAN = TensorNames(query_norm="self_attn.query_layernorm", key_norm="self_attn.key_layernorm")
STARCODER2 = TensorNames(up="mlp.c_fc", down="mlp.c_proj")
MIXTRAL = TensorNames(
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{number}",
    expert_gate="w1",
    expert_up="w3",
    expert_down="w2",
)
GPT_OSS = TensorNames(router="mlp.router")
