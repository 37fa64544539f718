"""Rotary position embedding: the tables of cosines and sines, by transformers' own initialisers."""

from __future__ import annotations

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from easyspec.errors import ConfigurationError
from easyspec.model.config import ModelConfig
from easyspec.ops.program import Rotary

SUPPORTED_ROPE_TYPES = ("default", "llama3", "linear", "dynamic", "yarn")


def rotary_tables(config: ModelConfig, device: torch.device) -> Rotary:
    """Cosines and sines of every position, float32 [max_model_len, D / 2] each.

    `frequency_factors` of a GGUF file, one for each frequency, divide them. `dynamic` scaling only changes anything
    beyond the checkpoint's own context, which is where we stop.
    """
    parameters = config.hf_config.rope_parameters
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ConfigurationError(f"rope_type is {rope_type!r}; supported: {', '.join(SUPPORTED_ROPE_TYPES)}")
    if rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        inverse_frequencies, scaling = 1.0 / parameters["rope_theta"] ** exponents, 1.0
    else:
        inverse_frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config.hf_config, torch.device("cpu"))
    if (factors := parameters.get("frequency_factors")) is not None:
        inverse_frequencies = inverse_frequencies / torch.tensor(factors)
    positions = torch.arange(config.max_model_len, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies.float()[None, :]
    return Rotary((angles.cos() * scaling).to(device).contiguous(), (angles.sin() * scaling).to(device).contiguous())
