"""GGUF files of small models, written with the `gguf` package as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tests.fakes.gguf_families import ARCHITECTURES, Renamed, family_metadata, gguf_name, whole_rope

__all__ = ["gguf_name", "write_gguf"]

# Where the scales of formats that the package does not write stand in a block, as numbers of float16.
_SCALES = {"Q4_K": (0, 1), "Q5_K": (0, 1), "Q6_K": (104,), "Q2_K": (40, 41)}


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
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_shape(config), **family_metadata(config), **_vocabulary(folder, config)}.items():
        _add(writer, key.format(arch=architecture), value)
    for key, value in (metadata or {}).items():
        _add(writer, key.format(arch=architecture), value)
    weights = load_file(folder / "model.safetensors")
    named = Renamed(config, weights)
    for stored_name, values in named.stored.items():
        is_matrix = values.ndim > 1 and not stored_name.endswith("bias") and "ffn_gate_inp" not in stored_name
        ggml_kind = GGMLQuantizationType[kind if is_matrix else "F32"]
        blocks = _blocks(values, ggml_kind)
        writer.add_tensor(stored_name, blocks, raw_dtype=ggml_kind)
        named.put_back(stored_name, gguf.quants.dequantize(blocks, ggml_kind).reshape(values.shape))
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
        "{arch}.attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 0.0)),
        "{arch}.rope.freq_base": float(whole_rope(config)["rope_theta"]),
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
