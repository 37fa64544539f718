"""Models that need no download: a shape with random weights, made on the device itself, and rows for their passes."""

from __future__ import annotations

import json
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from easyspec.model.config import load_config
from easyspec.model.decoder import Decoder
from easyspec.model.row_layout import Segment
from easyspec.model.stored_blocks import StoredBlocks
from easyspec.ops.executor import Executor
from easyspec.planner.shape import ModelShape

# Small enough that activations stay finite through any number of layers.
_STD = 0.02


class RandomWeights(AbstractContextManager["RandomWeights"]):
    """A TensorSource: every tensor is normal, made when it is asked for, and the same for the same name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __exit__(self, *_: object) -> None:
        pass

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        whole = torch.empty(shape, dtype=torch.bfloat16, device=self._device).normal_(0.0, _STD, generator=generator)
        whole = whole + 1.0 if len(shape) == 1 else whole
        cut = whole if rows is None else whole[rows.start : rows.stop]
        return cut if columns is None else cut[:, columns.start : columns.stop]

    def blocks(self, name: str, shape: tuple[int, ...], rows: range | None = None) -> StoredBlocks | None:
        return None


def write_config(folder: Path, shape: ModelShape, dtype: str, max_model_len: int, **others: object) -> Path:
    """The `config.json` of a Llama of this shape, with other values where they are given; returns the folder."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": max_model_len,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | others), encoding="utf-8")
    return folder


def random_decoder(folder: Path, executor: Executor, **options: Any) -> Decoder:
    """A decoder of the configuration in `folder`."""
    return Decoder(
        folder, load_config(folder), executor, open_tensors=lambda _: RandomWeights(executor.device), **options
    )


def chain(num_rows: int, num_context_tokens: int) -> Segment:
    """Rows one after the other behind so many tokens, whatever these were, in the first slots of a pool."""
    positions = range(num_context_tokens, num_context_tokens + num_rows)
    visible = [position + 1 for position in positions]  # as many as the slot's number
    return Segment([*range(num_rows)], positions, visible, visible, np.arange(1, positions.stop + 1, dtype=np.int64))
