"""Shape of a decoder of the Llama family, read from a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from easyspec.errors import ConfigurationError
from easyspec.model.families import SUPPORTED_ACTIVATIONS, SUPPORTED_MODEL_TYPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know; `hf_config` is kept for transformers' own initialisers.

    `early_exits`: numbers of layers, rising, all below `num_layers`, after which the final norm and the head may be
    applied because the checkpoint was trained that way (S2D, arXiv 2407.01955). Empty for ordinary checkpoints.
    """

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
    early_exits: tuple[int, ...] = ()

    def window_of_layer(self, layer: int) -> int | None:
        """How many positions a row sees in a layer, its own included; None: all."""
        return None

    @property
    def num_queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def has_qkv_bias(self) -> bool:
        return self.hf_config.model_type == "qwen2" or self.has_output_bias

    @property
    def has_output_bias(self) -> bool:
        """Whether attention's output projection has a bias; a tensor that is there in spite of this is not used."""
        return self.hf_config.model_type in ("llama", "qwen3") and bool(self.hf_config.attention_bias)

    @property
    def has_mlp_bias(self) -> bool:
        return self.hf_config.model_type == "llama" and bool(self.hf_config.mlp_bias)


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
    hf = _read_hf_config(folder)
    _check_supported(folder, hf)
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
        early_exits=_early_exits(folder, hf),
    )


def _read_hf_config(folder: Path) -> Any:
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"no usable config.json in {folder}: {error!r}") from error
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigurationError(
            f"model_type is {model_type!r} in {folder}; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # a wrong value raises whatever transformers first trips over
        raise ConfigurationError(f"no usable config.json in {folder}: {error}") from error


def _check_supported(folder: Path, hf: Any) -> None:
    """Raise ConfigurationError for a model of a supported type that this decoder would get wrong."""
    for field in _COUNTS:
        if getattr(hf, field) < 1:
            raise ConfigurationError(f"{field} is {getattr(hf, field)} in {folder}; allowed: at least 1")
    if hf.hidden_act not in SUPPORTED_ACTIVATIONS:
        raise ConfigurationError(f"hidden_act is {hf.hidden_act!r} in {folder}; supported: silu")
    if getattr(hf, "quantization_config", None) is not None:
        raise ConfigurationError(f"quantization_config is set in {folder}; supported: unquantized checkpoints")
    num_kv_heads = hf.num_key_value_heads or hf.num_attention_heads
    if hf.num_attention_heads % num_kv_heads != 0:
        raise ConfigurationError(
            f"num_key_value_heads is {num_kv_heads} in {folder}; allowed: divisors of num_attention_heads,"
            f" {hf.num_attention_heads}"
        )


def _context_length(hf: Any) -> int:
    """Positions the checkpoint allows; a sliding window ends the context, as we attend to all of it."""
    window = getattr(hf, "sliding_window", None)
    uses_window = window is not None and getattr(hf, "use_sliding_window", True)
    return min(hf.max_position_embeddings, window) if uses_window else int(hf.max_position_embeddings)


def _eos_token_ids(folder: Path, hf: Any) -> tuple[int, ...]:
    eos = hf.eos_token_id
    if (folder / "generation_config.json").exists():
        try:
            generation_eos = GenerationConfig.from_pretrained(folder).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(f"no usable generation_config.json in {folder}: {error}") from error
        eos = eos if generation_eos is None else generation_eos
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def _early_exits(folder: Path, hf: Any) -> tuple[int, ...]:
    """`exit_layers` of the checkpoint without the last layer, which every checkpoint may be left at."""
    exits = getattr(hf, "exit_layers", None) or []
    is_list = isinstance(exits, list | tuple) and all(type(layers) is int for layers in exits)
    if not is_list or list(exits) != sorted(set(exits)) or not all(1 <= e <= hf.num_hidden_layers for e in exits):
        raise ConfigurationError(
            f"exit_layers is {exits!r} in {folder}; allowed: rising numbers of layers, 1 to {hf.num_hidden_layers}"
        )
    return tuple(layers for layers in exits if layers < hf.num_hidden_layers)


def _dtype(dtype: str, hf: Any) -> torch.dtype:
    """The type to compute in; `auto` is the checkpoint's own."""
    name = str(hf.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ConfigurationError(f"dtype is {name!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]
