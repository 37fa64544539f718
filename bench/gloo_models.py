"""Random-weight Llama models for measurements of ranks, and passes over them as the services make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from easyspec.model.decoder import Decoder
from easyspec.model.row_layout import Segment, lay_out
from easyspec.ops.kv_pool import KVPool
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.planner.shape import ModelShape

BASE = ModelShape("base", 8, 1024, 16, 8, 64, 2816, 8192, bytes_per_value=4)
DRAFT = ModelShape("draft", 10, 512, 8, 4, 64, 1408, 8192, bytes_per_value=4)
# So narrow that only the number of operations counts.
TINY = ModelShape("tiny", 12, 64, 4, 2, 16, 128, 256, bytes_per_value=4)
NUM_SLOTS = 1024


def typical(times: Sequence[float]) -> float:
    """The lower quartile: what disturbs a measurement only ever adds to it, and a busy host does so often."""
    return sorted(times)[len(times) // 4]


def write_model(folder: Path, shape: ModelShape) -> Path:
    """A checkpoint of this shape, float32, weights random with a fixed seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=NUM_SLOTS,
        dtype="float32",
    )
    target = folder / shape.name
    LlamaForCausalLM(config).save_pretrained(target)
    return target


def chain(num_rows: int, context_tokens: int) -> Segment:
    """Rows one after the other behind `context_tokens`, whatever these were."""
    positions = range(context_tokens, context_tokens + num_rows)
    by_position = np.arange(1, NUM_SLOTS, dtype=np.int64)
    visible = [position + 1 for position in positions]
    return Segment([*range(num_rows)], positions, visible, visible, by_position)


def decoder_pass(
    decoder: Decoder, pool: KVPool, num_rows: int, context_tokens: int, plan: LayerPlan | None = None
) -> torch.Tensor:
    """Logits of all rows of a chain, laying out and head included."""
    layout = lay_out([chain(num_rows, context_tokens)])
    return decoder.forward(layout, pool, plan, range(num_rows)).logits
