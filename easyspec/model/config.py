"""What a decoder computes and for how long a text, read from a Hugging Face checkpoint folder or a GGUF file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import structlog
import torch

from easyspec.checkpoint.generation import end_token_ids
from easyspec.checkpoint.gguf_header import read_header
from easyspec.checkpoint.location import is_gguf
from easyspec.errors import ConfigurationError
from easyspec.model.gguf_config import config_of
from easyspec.model.layer_spec import ModelSpec
from easyspec.model.model_families import FAMILIES, head_dim, model_spec, rope_parameters
from easyspec.model.plain_config import plain_json_config
from easyspec.model.quantization.announced import announced_quantization
from easyspec.model.supported_models import SUPPORTED_ACTIVATIONS, SUPPORTED_MODEL_TYPES, TOWER_MODEL_TYPES
from easyspec.model.tensor_names import TensorNames

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
# Settings of other models that change what is computed, with the values that change nothing.
_FOREIGN_SETTINGS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "dual_chunk_attention_config": (),
        "attention_chunk_size": (),
        "attn_logit_softcapping": (),
        "final_logit_softcapping": (),
        "query_pre_attn_scalar": (),
        "no_rope_layers": ([],),
        "no_rope_layer_interval": (0,),
        "alibi": (False,),
        "embedding_multiplier": (1,),
        "residual_multiplier": (1,),
        "attention_multiplier": (),
        "logits_scaling": (1,),
        "logit_scale": (1,),
        "partial_rotary_factor": (1,),
        "num_experts": (0, 1),
        "num_local_experts": (0, 1),
    }
)
_LAYER_TYPES = ("full_attention", "sliding_attention")
_NO_END_ADVICE = (
    "answers end at their length limit alone, and grammars are refused: set eos_token_id in generation_config.json"
)
# Rotary types whose angles at a position do not depend on how long the text is: they go on beyond the context.
_ENDLESS_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class ModelConfig:
    """What the forward pass needs to know; `hf_config` is kept for transformers' own initialisers.

    `early_exits`: numbers of layers, rising, all below `num_layers`, after which the final norm and the head may be
    applied because the checkpoint was trained that way (S2D, arXiv 2407.01955). Empty for ordinary checkpoints.
    `intermediate_size`: of MLPs that are not mixtures of experts; `spec`: what each layer computes.
    `draft_vocabulary`: the only tokens that a draft model names, rising; its head has rows for them alone. None: all.
    `pard_token`: the mask token of a draft model that fills in several at once (PARD, arXiv 2504.18583).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_model_len: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype
    hf_config: Any
    spec: ModelSpec
    early_exits: tuple[int, ...] = ()
    draft_vocabulary: tuple[int, ...] | None = None
    pard_token: int | None = None

    @property
    def names(self) -> TensorNames:
        """What the family's tensors are called."""
        return FAMILIES[self.hf_config.model_type].names


def load_config(folder: Path, dtype: str = "auto", max_model_len: int | None = None) -> ModelConfig:
    """Read `config.json`, or a GGUF file's metadata.

    Raises ConfigurationError for what is missing, corrupt or unsupported.
    `max_model_len` None is what the checkpoint was made for.
    """
    hf = _read_hf_config(folder)
    _check_supported(folder, hf)
    exits = _rising(folder, hf, "exit_layers", 1, hf.num_hidden_layers)
    eos_token_ids = end_token_ids(folder, hf.eos_token_id)
    if not eos_token_ids:
        structlog.get_logger().warning("no_end_token", folder=str(folder), advice=_NO_END_ADVICE)
    token_id = getattr(hf, "pard_token", None)
    if token_id is not None and not (type(token_id) is int and 0 <= token_id < hf.vocab_size):
        raise ConfigurationError(f"pard_token is {token_id!r} in {folder}; allowed: 0 to {hf.vocab_size - 1}")
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        head_dim=head_dim(hf),
        intermediate_size=hf.intermediate_size,
        max_model_len=_context(folder, hf, max_model_len),
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        eos_token_ids=eos_token_ids,
        dtype=_dtype(dtype, hf),
        hf_config=hf,
        spec=model_spec(hf, _layer_windows(folder, hf)),
        # Every checkpoint may be left at the last layer.
        early_exits=tuple(layers for layers in exits if layers < hf.num_hidden_layers),
        draft_vocabulary=_rising(folder, hf, "draft_vocabulary", 0, hf.vocab_size - 1) or None,
        pard_token=token_id,
    )


def _read_hf_config(folder: Path) -> Any:
    if is_gguf(folder):
        return config_of(read_header(folder))
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        model_type = fields["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"no usable config.json in {folder}: {error!r}") from error
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigurationError(
            f"model_type is {model_type!r} in {folder}; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if (plain := plain_json_config(fields)) is not None:
        return plain
    from transformers import AutoConfig  # for other families alone

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # a wrong value raises whatever transformers first trips over
        raise ConfigurationError(f"no usable config.json in {folder}: {error}") from error
    if model_type not in TOWER_MODEL_TYPES:
        return config
    # The text tower inherits what only the whole model has.
    tower = config.get_text_config()
    if tower.model_type not in FAMILIES:
        raise ConfigurationError(
            f"text_config's model_type is {tower.model_type!r} in {folder}; supported: {', '.join(FAMILIES)}"
        )
    for name in ("dtype", "eos_token_id", "quantization_config"):
        if getattr(tower, name, None) is None and getattr(config, name, None) is not None:
            setattr(tower, name, getattr(config, name))
    return tower


def _check_supported(folder: Path, hf: Any) -> None:
    """Raise ConfigurationError for a model of a supported type that this decoder would get wrong."""
    if getattr(hf, "is_heterogeneous", False):
        raise ConfigurationError(f"per_layer_config is set in {folder}; supported: layers of one shape")
    for field in _COUNTS:
        if getattr(hf, field) < 1:
            raise ConfigurationError(f"{field} is {getattr(hf, field)} in {folder}; allowed: at least 1")
    family = FAMILIES[hf.model_type]
    activation = getattr(hf, family.activation)
    if activation not in SUPPORTED_ACTIVATIONS:
        raise ConfigurationError(
            f"{family.activation} is {activation!r} in {folder}; supported: {', '.join(SUPPORTED_ACTIVATIONS)}"
        )
    for name, neutral in _FOREIGN_SETTINGS.items():
        value = getattr(hf, name, rope_parameters(hf).get(name))
        if name not in family.settings and value is not None and value not in neutral:
            raise ConfigurationError(
                f"{name} is {value!r} in {folder}; supported for model_type {hf.model_type!r}: "
                f"{', '.join(map(repr, neutral)) or 'unset'}, as what it asks for is not computed here"
            )
    if (announced := getattr(hf, "quantization_config", None)) is not None:
        announced_quantization(announced, folder)
    num_kv_heads = hf.num_key_value_heads or hf.num_attention_heads
    if hf.num_attention_heads % num_kv_heads != 0:
        raise ConfigurationError(
            f"num_key_value_heads is {num_kv_heads} in {folder}; allowed: divisors of num_attention_heads,"
            f" {hf.num_attention_heads}"
        )


def _layer_windows(folder: Path, hf: Any) -> tuple[int | None, ...]:
    """The window of each layer: `sliding_window` where `layer_types` has one, and everywhere if it names no layers."""
    window = getattr(hf, "sliding_window", None)
    types = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    if unknown := sorted(set(types) - set(_LAYER_TYPES)):
        raise ConfigurationError(f"layer_types has {unknown} in {folder}; supported: {', '.join(_LAYER_TYPES)}")
    if len(types) != hf.num_hidden_layers:
        raise ConfigurationError(
            f"layer_types names {len(types)} layers in {folder}; allowed: num_hidden_layers, {hf.num_hidden_layers}"
        )
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in types)


def _context(folder: Path, hf: Any, asked: int | None) -> int:
    """Positions that are served: what was asked for, or what the checkpoint was made for.

    ConfigurationError for more than can be computed; more than the checkpoint was made for is warned of.
    """
    made_for = _made_for(hf)
    if asked is None or asked <= made_for:
        return asked or made_for
    rope_type = rope_parameters(hf).get("rope_type", "default")
    if rope_type not in _ENDLESS_ROPE_TYPES or rope_parameters(hf).get("llama_4_scaling_beta"):
        raise ConfigurationError(
            f"max_model_len is {asked}; allowed: up to {made_for}, the checkpoint's, as its rope_type is {rope_type}"
        )
    structlog.get_logger().warning(
        "context_beyond_checkpoint", folder=str(folder), max_model_len=asked, made_for=made_for, rope_type=rope_type
    )
    return asked


def _made_for(hf: Any) -> int:
    """Positions by the model card: YaRN and linear scaling multiply what the model was first trained for.

    `max_position_embeddings` is the length before scaling in some checkpoints and after it in others: the longer of
    the two readings counts. Llama 3's type states the length after scaling, `dynamic` changes its angles beyond it.
    `longrope` has other angles for texts that may be longer than what the model was first trained for, and is a little
    worse at short ones by them: who wants longer texts asks for them. Ministral's scores are scaled by the position
    from there on, which is not computed.
    """
    parameters, positions = rope_parameters(hf), int(hf.max_position_embeddings)
    if parameters.get("rope_type") == "longrope" or parameters.get("llama_4_scaling_beta"):
        return min(positions, int(parameters.get("original_max_position_embeddings") or positions))
    if parameters.get("rope_type") not in ("yarn", "linear") or FAMILIES[hf.model_type].counts_scaled_positions:
        return positions
    original = parameters.get("original_max_position_embeddings") or positions
    factor = parameters.get("factor") or 1.0
    return max(positions, math.floor(original * factor))


def _rising(folder: Path, hf: Any, name: str, least: int, most: int) -> tuple[int, ...]:
    """A field that lists numbers, empty where it is unset."""
    numbers = getattr(hf, name, None)
    if numbers is None or (numbers == [] and name == "exit_layers"):
        return ()
    is_list = isinstance(numbers, list | tuple) and all(type(number) is int for number in numbers)
    if not is_list or not numbers or list(numbers) != sorted(set(numbers)) or numbers[0] < least or numbers[-1] > most:
        shown = repr(numbers) if len(repr(numbers)) <= 80 else "a long list"
        raise ConfigurationError(f"{name} is {shown} in {folder}; allowed: rising numbers, {least} to {most}")
    return tuple(numbers)


def _dtype(dtype: str, hf: Any) -> torch.dtype:
    """The type to compute in; `auto` is the checkpoint's own."""
    name = str(hf.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ConfigurationError(f"dtype is {name!r}; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]
