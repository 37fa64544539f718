"""What passes and rounds of real ranks take: every rank calls this, rank 0 leads as in the services.

Base and draft live in the same ranks and take turns; when rank 0 turns to the other model it dismisses the followers
of the one, which is one broadcast a turn that services, whose roles are processes of their own, do not make.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from easyspec.planner.planner import Workload
from easyspec.planner.scheme import DraftScheme
from easyspec.planner.shape import ModelShape

BASE = ModelShape("base", 8, 1024, 16, 8, 64, 2816, 8192, bytes_per_value=4)
DRAFT = ModelShape("draft", 10, 512, 8, 4, 64, 1408, 8192, bytes_per_value=4)
# So narrow that only the number of operations counts.
TINY = ModelShape("tiny", 12, 64, 4, 2, 16, 128, 256, bytes_per_value=4)
NUM_SLOTS = 1024
CPU = torch.device("cpu")
CALIBRATED_ROWS = 5
WORKLOAD = Workload(num_levels=5, tree_width=4, num_nodes=15, context_tokens=256, overhead_us=0.0)
_WARM_UPS = 3


def typical(times: Sequence[float]) -> float:
    """The lower quartile: what disturbs a measurement only ever adds to it, and a busy host does so often."""
    return sorted(times)[len(times) // 4]


@dataclass(frozen=True)
class Model:
    """A rank's part of a model, and its KV pool."""

    decoder: Decoder
    pool: KVPool

    def run(self, num_rows: int, context_tokens: int, plan: LayerPlan | None = None) -> torch.Tensor:
        """Logits of all rows of a chain, laying out and head included."""
        layout = lay_out([chain(num_rows, context_tokens)])
        return self.decoder.forward(layout, self.pool, plan, range(num_rows)).logits


def load(
    folder: Path, shape: ModelShape, ranks: Ranks = SINGLE_RANK, placement: RankPlacement = RankPlacement.TENSOR
) -> Model:
    """This rank's part of a float32 model of this shape; `folder` is for its configuration."""
    write_config(folder / shape.name, shape, "float32", NUM_SLOTS)
    executor = choose_executor("auto", CPU, num_threads=1)
    decoder = random_decoder(folder / shape.name, executor, ranks=ranks, placement=placement)
    return Model(decoder, decoder.new_pool(NUM_SLOTS))


def measure_rounds(
    base: Model, draft: Model, scheme: DraftScheme, ranks: Ranks, num_rounds: int
) -> dict[str, float] | None:
    """Rank 0's times of calibrate, a fuzzy step, verify and the whole round, lower quartiles of rounds in milliseconds;
    None on the others."""
    if ranks.rank != 0:
        for _ in range(num_rounds + _WARM_UPS):
            draft.decoder.follow(draft.pool)
            base.decoder.follow(base.pool)
        return None
    w = WORKLOAD
    rounds = []
    for _ in range(num_rounds + _WARM_UPS):
        times = [time.perf_counter()]
        draft.run(CALIBRATED_ROWS, w.context_tokens)
        times.append(time.perf_counter())
        for _ in range(w.num_levels - 1):
            draft.run(w.tree_width, w.context_tokens + 16, scheme.plan)
        times.append(time.perf_counter())
        draft.decoder.dismiss_followers()
        base.run(w.num_nodes + 1, w.context_tokens)
        times.append(time.perf_counter())
        base.decoder.dismiss_followers()
        rounds.append([1e3 * (time.perf_counter() - times[0]), *(1e3 * (b - a) for a, b in itertools.pairwise(times))])
    round_ms, calibrate_ms, fuzzy_ms, verify_ms = (typical(column) for column in zip(*rounds[_WARM_UPS:], strict=True))
    return {"calibrate": calibrate_ms, "step": fuzzy_ms / (w.num_levels - 1), "verify": verify_ms, "round": round_ms}
