"""The size of a model: what a pass over it reads and computes, in bytes and operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

_BYTES_PER_VALUE = 2  # bfloat16 weights and KV, which is what GPUs serve


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a `config.json` that cost time. Parameters are counted without biases and norms."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    bytes_per_value: int = _BYTES_PER_VALUE

    @property
    def attention_parameters(self) -> int:
        """Of one layer: query, key, value and output projections."""
        return self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Of one layer: gate, up and down projections."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def head_parameters(self) -> int:
        """The output head; the embedding table is only looked up."""
        return self.hidden_size * self.vocab_size

    @property
    def weight_bytes(self) -> int:
        """Everything that must lie in memory, embeddings and head both."""
        layers = self.num_layers * (self.attention_parameters + self.mlp_parameters)
        return self.bytes_per_value * (layers + 2 * self.head_parameters)

    def kv_bytes(self, num_tokens: int) -> int:
        """Keys and values of one layer."""
        return self.bytes_per_value * 2 * self.num_kv_heads * self.head_dim * num_tokens

    def supported_ranks(self, most: int) -> list[int]:
        """Tensor-parallel sizes up to `most` that split heads and MLP evenly; KV heads may be replicated."""
        return [
            ranks
            for ranks in range(1, most + 1)
            if self.num_heads % ranks == 0
            and self.intermediate_size % ranks == 0
            and (self.num_kv_heads % ranks == 0 or ranks % self.num_kv_heads == 0)
        ]


# Shapes of public models, from their config.json, so that one can plan before downloading anything.
KNOWN_SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            ModelShape("llama-3-70b", 80, 8192, 64, 8, 128, 28_672, 128_256),
            ModelShape("llama-3-8b", 32, 4096, 32, 8, 128, 14_336, 128_256),
            ModelShape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128_256),
            ModelShape("qwen2-72b", 80, 8192, 64, 8, 128, 29_568, 152_064),
            ModelShape("qwen2-7b", 28, 3584, 28, 4, 128, 18_944, 152_064),
            ModelShape("qwen2-1.5b", 28, 1536, 12, 2, 128, 8960, 151_936),
        )
    }
)


def find_shape(model: str) -> ModelShape:
    """The shape of a known model, a checkpoint folder or a hub id; of those only config.json is looked at.

    Raises ConfigurationError for a checkpoint that is missing or not supported.
    """
    if model.lower() in KNOWN_SHAPES:
        return KNOWN_SHAPES[model.lower()]
    # Imported here: it brings torch along, and known shapes need none of it.
    from easyspec.checkpoint.location import TOKENIZER_PATTERNS, model_path
    from easyspec.model.config import load_config

    config = load_config(model_path(model, TOKENIZER_PATTERNS))
    return ModelShape(
        name=Path(model).name,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        bytes_per_value=config.dtype.itemsize,
    )
