"""Rotary position embedding: the tables of cosines and sines, by transformers' own initialisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from easyspec.errors import ConfigurationError
from easyspec.model.config import ModelConfig
from easyspec.model.layer_spec import RotarySpec
from easyspec.model.model_families import rope_parameters
from easyspec.ops.program import Rotary

SUPPORTED_ROPE_TYPES = ("default", "llama3", "linear", "dynamic", "yarn", "longrope")


def rotary_tables(config: ModelConfig, device: torch.device) -> dict[RotarySpec, Rotary]:
    """Of every kind of layer: cosines and sines of every position, float32 [max_model_len, dim / 2] each.

    `frequency_factors` of a GGUF file, one for each frequency, divide them. `dynamic` scaling only changes anything
    beyond the checkpoint's own context, which is where we stop; `longrope` has one set of angles for contexts up to
    `original_max_position_embeddings` and another for longer ones.
    """
    return {spec: _table(config, spec, device) for spec in config.spec.rotaries}


def _table(config: ModelConfig, spec: RotarySpec, device: torch.device) -> Rotary:
    parameters = rope_parameters(config.hf_config, spec.layer_type)
    inverse_frequencies, scaling = _frequencies(config, spec, parameters)
    if (factors := parameters.get("frequency_factors")) is not None:
        inverse_frequencies = inverse_frequencies / torch.tensor(factors)
    positions = torch.arange(config.max_model_len, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies.float()[None, :]
    return Rotary((angles.cos() * scaling).to(device).contiguous(), (angles.sin() * scaling).to(device).contiguous())


def _frequencies(config: ModelConfig, spec: RotarySpec, parameters: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [dim / 2], and what cosines and sines are multiplied by."""
    rope_type, base = parameters.get("rope_type", "default"), parameters["rope_theta"]
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ConfigurationError(f"rope_type is {rope_type!r}; supported: {', '.join(SUPPORTED_ROPE_TYPES)}")
    if rope_type == "dynamic" and parameters.get("alpha"):  # Hunyuan's, which is a longer base
        rope_type, base = "default", base * parameters["alpha"] ** (spec.dim / (spec.dim - 2))
    if rope_type == "default":
        exponents = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
        return 1.0 / base**exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # for these alone: it takes seconds

    options: dict[str, Any] = {} if spec.layer_type is None else {"layer_type": spec.layer_type}
    if rope_type == "longrope":
        options["seq_len"] = config.max_model_len
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config.hf_config, torch.device("cpu"), **options)
    return frequencies, float(scaling)
