"""A larger checkpoint that computes the same function, to measure a realistic cost.

The residual stream gets `factor` times as many dimensions and the new ones stay zero: embeddings are padded with zeros
and no block writes to them. Heads, KV heads and MLP units are multiplied too; the new ones compute on random weights
and their outputs meet zero columns. The mean square of a padded vector is 1 / factor of the original's, so norm weights
are divided by sqrt(factor) and epsilons by factor. Added layers write nothing at all. Every weight is read and
multiplied as in a real model of that shape, and the logits stay what they were up to floating-point order.
"""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from models.recipe.llama import TOKENIZER_FILES

_LAYER_KEY = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SHARD_SIZE = "400MB"


@dataclass(frozen=True)
class WidenSettings:
    """How much larger; the defaults make about 0.33 B parameters of the bundled base."""

    factor: int = 6
    num_extra_layers: int = 8
    dtype: torch.dtype = torch.float32
    seed: int = 0


def widen_checkpoint(source: Path, out: Path, settings: WidenSettings) -> int:
    """Write the widened checkpoint of `source` to `out` with tokenizer and generation settings.

    Returns its number of parameters. In bfloat16 the norm weights round, so logits move by about
    2**-8 of their size unless `factor` is a power of four.
    """
    small = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    wide = widen_model(small, settings).to(settings.dtype)
    out.mkdir(parents=True, exist_ok=True)
    wide.generation_config = GenerationConfig.from_pretrained(source)
    wide.save_pretrained(out, max_shard_size=_SHARD_SIZE)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    num_params: int = wide.num_parameters()
    return num_params


def widen_model(small: LlamaForCausalLM, settings: WidenSettings) -> LlamaForCausalLM:
    """Return a float32 model of the larger shape with the same logits; `small` is not touched."""
    torch.manual_seed(settings.seed)
    wide = LlamaForCausalLM(wide_config(small.config, settings))
    old = small.state_dict()
    num_layers = small.config.num_hidden_layers
    source_of: list[int | None] = []  # the old layer that each new one repeats; layers without one are spread evenly
    for layer in range(num_layers):
        num_due = (layer + 1) * settings.num_extra_layers // num_layers
        source_of += [layer, *[None] * (num_due - source_of.count(None))]
    state = {key: _widened(key, value, old, source_of, settings.factor) for key, value in wide.state_dict().items()}
    wide.load_state_dict(state)
    return wide.eval()


def wide_config(config: LlamaConfig, settings: WidenSettings) -> LlamaConfig:
    """Return the larger shape; the ratio of heads to KV heads and the head size stay, so query
    head i still reads KV head i // ratio. Raises ValueError for a factor below 1."""
    if settings.factor < 1 or settings.num_extra_layers < 0:
        raise ValueError(
            f"factor must be at least 1 and num_extra_layers at least 0, not "
            f"{settings.factor} and {settings.num_extra_layers}"
        )
    wide = copy.deepcopy(config)
    wide.head_dim = config.head_dim
    wide.hidden_size = config.hidden_size * settings.factor
    wide.num_attention_heads = config.num_attention_heads * settings.factor
    wide.num_key_value_heads = config.num_key_value_heads * settings.factor
    wide.intermediate_size = config.intermediate_size * settings.factor
    wide.num_hidden_layers = config.num_hidden_layers + settings.num_extra_layers
    wide.rms_norm_eps = config.rms_norm_eps / settings.factor
    return wide


def _widened(key: str, random: Tensor, old: dict[str, Tensor], source_of: list[int | None], factor: int) -> Tensor:
    """Return the value of one parameter of the wide model, given its random initial value."""
    found = _LAYER_KEY.fullmatch(key)
    source = source_of[int(found.group(1))] if found else None
    if found and source is None:
        return torch.zeros_like(random) if _writes(key) else random
    old_key = f"model.layers.{source}.{found.group(2)}" if found else key
    value = old[old_key]
    if key.endswith("norm.weight"):
        wide = torch.ones_like(random)
        wide[: len(value)] = value / factor**0.5
        return wide
    # What reads the residual stream may have any weights on its zero dimensions; what writes to
    # it, and the embedding that starts it, must leave them at zero.
    wide = torch.zeros_like(random) if _writes(key) or "embed" in key else random.clone()
    wide[: value.shape[0], : value.shape[1]] = value
    if key == "lm_head.weight":
        wide[:, value.shape[1] :] = 0
    return wide


def _writes(key: str) -> bool:
    return key.endswith(("o_proj.weight", "down_proj.weight"))
