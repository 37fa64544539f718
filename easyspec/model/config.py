"""Shape of a decoder of the Llama family, read from a Hugging Face checkpoint folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from easyspec.errors import ConfigurationError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know; `hf_config` is kept for transformers' own initialisers."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    max_model_len: int
    tie_word_embeddings: bool
    has_qk_norm: bool
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    hf_config: Any

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads


def checkpoint_folder(model: str) -> Path:
    """Folder of a checkpoint: the path itself, or a hub id already in or fetched into the local cache."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise ConfigurationError(f"model is {model!r}: neither a folder nor a hub id that can be fetched") from error


def load_config(folder: Path, dtype: str = "auto", max_model_len: int | None = None) -> ModelConfig:
    """Read `config.json`; raises ConfigurationError for what is missing, corrupt or unsupported."""
    try:
        hf = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"no usable config.json in {folder}: {error}") from error
    if hf.model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigurationError(
            f"model_type is {hf.model_type!r} in {folder}; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if hf.hidden_act not in ("silu", "swish"):
        raise ConfigurationError(f"hidden_act is {hf.hidden_act!r} in {folder}; supported: silu")
    context = _context_length(hf)
    if max_model_len is not None and max_model_len > context:
        raise ConfigurationError(f"max_model_len is {max_model_len}; allowed: up to {context}, the checkpoint's")
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        intermediate_size=hf.intermediate_size,
        rms_norm_eps=hf.rms_norm_eps,
        max_model_len=max_model_len or context,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        has_qk_norm=hf.model_type == "qwen3",
        eos_token_ids=_eos_token_ids(folder, hf),
        dtype=_dtype(dtype, hf),
        hf_config=hf,
    )


def _context_length(hf: Any) -> int:
    """Positions the checkpoint allows; a sliding window ends the context, as we attend to all of it."""
    window = getattr(hf, "sliding_window", None)
    uses_window = window is not None and getattr(hf, "use_sliding_window", True)
    return min(hf.max_position_embeddings, window) if uses_window else int(hf.max_position_embeddings)


def _eos_token_ids(folder: Path, hf: Any) -> tuple[int, ...]:
    eos = hf.eos_token_id
    if (folder / "generation_config.json").exists():
        eos = GenerationConfig.from_pretrained(folder).eos_token_id or eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def _dtype(dtype: str, hf: Any) -> torch.dtype:
    if dtype == "auto":
        stored = hf.dtype
        return stored if isinstance(stored, torch.dtype) else DTYPES.get(str(stored), torch.float32)
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype is {dtype!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
