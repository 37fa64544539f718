"""GGUF files of small models, written with the `gguf` package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Where the scales of formats that the package does not write stand in a block, as numbers of float16.
_SCALES = {"Q4_K": (0, 1), "Q5_K": (0, 1), "Q6_K": (104,), "Q2_K": (40, 41)}


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_NAMES[part]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def write_gguf(
    folder: Path,
    path: Path,
    kind: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[np.float32]] | None = None,
) -> Path:
    """The checkpoint and tokenizer of `folder` as a GGUF file with matrices of a `kind`; returns its path.

    The checkpoint's own weights become what the file stands for, so that it is the reference. `metadata` and
    `tensors` are further entries.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_shape(config), **_vocabulary(folder, config)}.items():
        _add(writer, key.format(arch=architecture), value)
    for key, value in (metadata or {}).items():
        _add(writer, key.format(arch=architecture), value)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        values = tensor.float().numpy()
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        num_heads = heads.get(name.split(".")[-2]) if architecture == "llama" else None
        stored = _paired(values, num_heads) if num_heads is not None else values
        ggml_kind = GGMLQuantizationType[kind if stored.ndim > 1 else "F32"]
        blocks = _blocks(stored, ggml_kind)
        writer.add_tensor(gguf_name(name), blocks, raw_dtype=ggml_kind)
        read = gguf.quants.dequantize(blocks, ggml_kind).reshape(stored.shape)
        weights[name] = torch.from_numpy(_halved(read, num_heads) if num_heads is not None else read).contiguous()
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return path


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "{arch}.block_count": config["num_hidden_layers"],
        "{arch}.context_length": config["max_position_embeddings"],
        "{arch}.embedding_length": config["hidden_size"],
        "{arch}.feed_forward_length": config["intermediate_size"],
        "{arch}.attention.head_count": config["num_attention_heads"],
        "{arch}.attention.head_count_kv": config["num_key_value_heads"],
        "{arch}.attention.key_length": head_dim,
        "{arch}.attention.value_length": head_dim,
        "{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "{arch}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "{arch}.rope.dimension_count": head_dim,
    }


def _vocabulary(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    if not (folder / "tokenizer.json").is_file():
        return {}
    content = json.loads((folder / "tokenizer.json").read_text())
    token_of = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in content["added_tokens"]}
    token_of |= special
    size = config["vocab_size"]
    kinds = [3 if i in special else 1 if i in token_of else 5 for i in range(size)]
    template = folder / "chat_template.jinja"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [token_of.get(i, f"[PAD{i}]") for i in range(size)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        **({"tokenizer.chat_template": template.read_text()} if template.is_file() else {}),
    }


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_array(key, value)


def _paired(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of a projection as llama.cpp has them: dimension i of a head beside dimension i + D/2."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _halved(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """The way back."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows.shape))


def _blocks(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """The values as blocks of a kind; of a kind that the package cannot write, random blocks of small numbers."""
    if kind.name not in _SCALES:
        return np.asarray(gguf.quants.quantize(values, kind))
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.size)
    blocks = rng.integers(0, 256, (values.size // block_size, block_bytes), np.uint8)
    scales = blocks.view(np.float16)
    for place in _SCALES[kind.name]:
        scales[:, place] = rng.uniform(1e-4, 4e-4, len(scales)).astype(np.float16)
    return blocks.reshape(*values.shape[:-1], -1)
