"""Hugging Face checkpoints of a few thousand random weights, large enough that logits differ clearly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.fakes.tiny_tokenizer import write_tokenizer

VOCAB_SIZE = 340
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}


def random_model(model_type: str = "llama", *, seed: int = 0, std: float = 0.15, **options: Any) -> Any:
    """A transformers model of `model_type` in float32; `options` are fields of its configuration.

    Matrices and biases are normal with deviation `std`, norm weights uniform in 0.5..1.5.
    """
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**_SHAPE, **options}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            parameter.data.normal_(0.0, std, generator=generator)
        else:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def write_checkpoint(
    folder: Path, model_type: str = "llama", *, max_shard_size: str = "1GB", has_tokenizer: bool = False, **options: Any
) -> Path:
    """Save a `random_model` to `folder`; see there for `options`. Above `max_shard_size` there are several files."""
    dtype = options.pop("dtype", torch.float32)
    random_model(model_type, **options).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return write_tokenizer(folder, VOCAB_SIZE) if has_tokenizer else folder


def reference_model(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """What transformers makes of a checkpoint."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def change_config(folder: Path, **fields: Any) -> None:
    """Overwrite fields of `config.json`; None removes one."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def change_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Replace a tensor of a checkpoint of one file, or leave it out."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    save_file(tensors if tensor is None else {**tensors, name: tensor}, path, metadata={"format": "pt"})
