"""How llama.cpp's converter names, shapes and describes what Hugging Face checkpoints of each family hold.

Names come from the `gguf` package's own table, so that a wrong name of ours cannot pass by being wrong twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float32]
ARCHITECTURES = {
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "gemma3_text": "gemma3",
}
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_PARTS = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"} | {
    f"{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")
}


def gguf_name(name: str, architecture: str = "llama") -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    arch = next(arch for arch, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    found = gguf.get_tensor_name_map(arch, 100).get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, f"{name} in {architecture}"
    return str(found)


def whole_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The angles of layers that see the whole text."""
    parameters: dict[str, Any] = config["rope_parameters"]
    return parameters.get("full_attention", parameters)


class Renamed:
    """`stored`: what goes into the file, by its names. What is read back is put into `weights` again."""

    def __init__(self, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        self._config = config
        self._weights = weights
        self._model_type = config["model_type"]
        self._architecture = ARCHITECTURES.get(self._model_type, self._model_type)
        self._back: dict[str, Callable[[Array], dict[str, Array]]] = {}
        self.stored: dict[str, Array] = {}
        experts: dict[str, list[str]] = {}
        for name in sorted(weights, key=_in_order):
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            if (found := _EXPERT.fullmatch(name)) is not None:
                block = found[1].split(".")[2]
                experts.setdefault(f"blk.{block}.{_PARTS[found[3]]}.weight", []).append(name)
            elif ".mlp.experts." in name:
                self._add_fused(name)
            else:
                self._add(name)
        for stored_name, names in experts.items():
            self.stored[stored_name] = np.stack([self._values(name) for name in names])
            self._back[stored_name] = lambda values, names=names: dict(zip(names, values, strict=True))

    def put_back(self, stored_name: str, values: Array) -> None:
        """What the file stands for becomes the checkpoint's."""
        for name, own in self._back[stored_name](values).items():
            if name.endswith(("gate_up_proj", "gate_up_proj_bias")):
                whole = self._weights[name].clone()
                whole[..., 0 if ".ffn_gate_exps" in stored_name else 1 :: 2] = torch.from_numpy(own)
                self._weights[name] = whole
            else:
                self._weights[name] = torch.from_numpy(np.ascontiguousarray(own))

    def _values(self, name: str) -> Array:
        values: Array = self._weights[name].float().numpy()
        return values

    def _add(self, name: str) -> None:
        values, stored_name = self._values(name), gguf_name(name, self._architecture)
        stored_name += ".weight" if name.endswith("sinks") else ""
        heads = {"q_proj": self._config["num_attention_heads"], "k_proj": self._config["num_key_value_heads"]}
        num_heads = heads.get(name.split(".")[-2]) if self._architecture == "llama" else None
        if num_heads is not None:
            self.stored[stored_name] = paired(values, num_heads)
            self._back[stored_name] = lambda read: {name: halved(read, num_heads)}
        elif self._architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            self.stored[stored_name] = values + 1.0
            self._back[stored_name] = lambda read: {name: read - 1.0}
        else:
            self.stored[stored_name] = values
            self._back[stored_name] = lambda read: {name: read}

    def _add_fused(self, name: str) -> None:
        """gpt-oss: gates and ups alternate in one matrix of all experts, which stands transposed."""
        values, block = self._values(name), name.split(".")[2]
        is_bias, kind = name.endswith("_bias"), "bias" if name.endswith("_bias") else "weight"
        parts = {"ffn_down_exps": values} if "down_proj" in name else {}
        if not parts:
            parts = {"ffn_gate_exps": values[..., ::2], "ffn_up_exps": values[..., 1::2]}
        for part, own in parts.items():
            stored_name = f"blk.{block}.{part}.{kind}"
            self.stored[stored_name] = np.ascontiguousarray(own if is_bias else own.swapaxes(1, 2))
            self._back[stored_name] = lambda read: {name: read if is_bias else read.swapaxes(1, 2)}


def _in_order(name: str) -> tuple[str, int]:
    """Experts by their numbers, which are of several digits."""
    found = _EXPERT.fullmatch(name)
    return (name, 0) if found is None else (f"{found[1]} {found[3]}", int(found[2]))


def family_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """What a family's files say beside what all say."""
    model_type = config["model_type"]
    found: dict[str, Any] = {}
    if model_type in ("mixtral", "qwen3_moe", "gpt_oss"):
        found["{arch}.expert_count"] = config.get("num_local_experts") or config["num_experts"]
        found["{arch}.expert_used_count"] = config["num_experts_per_tok"]
    if model_type in ("qwen3_moe", "gpt_oss"):
        found["{arch}.expert_feed_forward_length"] = config.get("moe_intermediate_size", config["intermediate_size"])
    if config.get("sliding_window") and model_type != "mixtral":
        found["{arch}.attention.sliding_window"] = config["sliding_window"]
    for field, key in (("attn", "attn_logit_softcapping"), ("final", "final_logit_softcapping")):
        if config.get(f"{field}_logit_softcapping"):
            found["{arch}." + key] = float(config[key])
    if model_type == "starcoder2":
        found["{arch}.attention.layer_norm_epsilon"] = float(config["norm_epsilon"])
    rope = whole_rope(config)
    if rope["rope_type"] in ("linear", "yarn"):
        found["{arch}.rope.scaling.type"] = rope["rope_type"]
        found["{arch}.rope.scaling.factor"] = float(rope["factor"])
    if "original_max_position_embeddings" in rope:
        found["{arch}.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if model_type == "phi3":
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        found["{arch}.rope.dimension_count"] = int(head_dim * rope.get("partial_rotary_factor", 1.0))
        if rope["rope_type"] == "longrope":
            original, longest = rope["original_max_position_embeddings"], config["max_position_embeddings"]
            factor = np.sqrt(1 + np.log(longest / original) / np.log(original))
            found["{arch}.rope.scaling.attn_factor"] = float(factor)
    return found


def paired(rows: Array, num_heads: int) -> Array:
    """Rows of a projection as llama.cpp has them: dimension i of a head beside dimension i + D/2."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def halved(rows: Array, num_heads: int) -> Array:
    """The way back."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))
