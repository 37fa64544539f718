"""Random-weight Llama models for measurements of ranks, and passes over them as the services make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness.random_weights import chain, random_decoder, write_config
from easyspec.model.decoder import Decoder
from easyspec.model.row_layout import lay_out
from easyspec.ops.executor import choose_executor
from easyspec.ops.kv_pool import KVPool
from easyspec.parallel.layer_groups import LayerPlan
from easyspec.parallel.rank_placement import RankPlacement
from easyspec.parallel.ranks import SINGLE_RANK, Ranks
from easyspec.planner.shape import ModelShape

BASE = ModelShape("base", 8, 1024, 16, 8, 64, 2816, 8192, bytes_per_value=4)
DRAFT = ModelShape("draft", 10, 512, 8, 4, 64, 1408, 8192, bytes_per_value=4)
# So narrow that only the number of operations counts.
TINY = ModelShape("tiny", 12, 64, 4, 2, 16, 128, 256, bytes_per_value=4)
NUM_SLOTS = 1024
CPU = torch.device("cpu")


def typical(times: Sequence[float]) -> float:
    """The lower quartile: what disturbs a measurement only ever adds to it, and a busy host does so often."""
    return sorted(times)[len(times) // 4]


def open_decoder(
    folder: Path, shape: ModelShape, ranks: Ranks = SINGLE_RANK, placement: RankPlacement = RankPlacement.TENSOR
) -> Decoder:
    """This rank's part of a float32 model of this shape; `folder` is for its configuration."""
    write_config(folder, shape, "float32", NUM_SLOTS)
    return random_decoder(folder, choose_executor("auto", CPU, num_threads=1), ranks=ranks, placement=placement)


def decoder_pass(
    decoder: Decoder, pool: KVPool, num_rows: int, context_tokens: int, plan: LayerPlan | None = None
) -> torch.Tensor:
    """Logits of all rows of a chain, laying out and head included."""
    layout = lay_out([chain(num_rows, context_tokens)])
    return decoder.forward(layout, pool, plan, range(num_rows)).logits
