"""Rotary position embedding on interleaved pairs.

Hugging Face checkpoints rotate dimension i against i + D/2. `interleave_heads` reorders the rows of
the query and key projections once so that the two stand side by side; a rotation is then one
complex product, and q . k is what it was.
"""

from __future__ import annotations

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from easyspec.errors import ConfigurationError
from easyspec.model.config import ModelConfig

SUPPORTED_ROPE_TYPES = ("default", "llama3", "linear", "dynamic", "yarn")


def rotation_table(config: ModelConfig, device: torch.device) -> torch.Tensor:
    """cos + i sin for every position, [max_model_len, D / 2] complex64, by transformers' own initialisers.

    `dynamic` scaling only changes anything beyond the checkpoint's own context, which is where we stop.
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
    positions = torch.arange(config.max_model_len, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies.float()[None, :]
    return torch.polar(torch.full_like(angles, float(scaling)), angles).to(device)


def interleave_heads(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of a projection, bias or norm weight [heads * D, ...] from halves to pairs."""
    halves = weight.view(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def rotate(heads: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate [T, ..., D] float32 by `rotation` [T, 1, ..., D / 2] complex64."""
    pairs = torch.view_as_complex(heads.view(*heads.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2)
