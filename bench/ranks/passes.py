"""What passes and rounds of real ranks take: every rank calls this, rank 0 leads as in the services.

Base and draft live in the same ranks and take turns; when rank 0 turns to the other model it dismisses the followers
of the one, which is one broadcast a turn that services, whose roles are processes of their own, do not make.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.ranks.models import NUM_SLOTS, decoder_pass, open_decoder, typical
from easyspec.model.decoder import Decoder
from easyspec.ops.kv_pool import KVPool
from easyspec.parallel.rank_placement import RankPlacement
from easyspec.parallel.ranks import Ranks
from easyspec.planner.planner import Workload
from easyspec.planner.scheme import DraftScheme
from easyspec.planner.shape import ModelShape

CALIBRATED_ROWS = 5
WORKLOAD = Workload(num_levels=5, tree_width=4, num_nodes=15, context_tokens=256, overhead_us=0.0)
_WARM_UPS = 3


@dataclass(frozen=True)
class RoundTimes:
    """Lower quartiles of rounds, milliseconds."""

    calibrate_ms: float
    fuzzy_step_ms: float
    verify_ms: float
    round_ms: float


@dataclass(frozen=True)
class Model:
    """A rank's part of a model, and its KV pool."""

    decoder: Decoder
    pool: KVPool


def load(folder: Path, shape: ModelShape, ranks: Ranks, placement: RankPlacement = RankPlacement.TENSOR) -> Model:
    decoder = open_decoder(folder / shape.name, shape, ranks, placement)
    return Model(decoder, decoder.new_pool(NUM_SLOTS))


def measure_rounds(base: Model, draft: Model, scheme: DraftScheme, ranks: Ranks, num_rounds: int) -> RoundTimes | None:
    """Rank 0's times of calibrate, fuzzy steps and verify, over whole rounds; None on the others."""
    if ranks.rank != 0:
        for _ in range(num_rounds + _WARM_UPS):
            draft.decoder.follow(draft.pool)
            base.decoder.follow(base.pool)
        return None
    w = WORKLOAD
    calibrate = partial(decoder_pass, draft.decoder, draft.pool, CALIBRATED_ROWS, w.context_tokens)
    fuzzy = partial(decoder_pass, draft.decoder, draft.pool, w.tree_width, w.context_tokens + 16, scheme.plan)
    verify = partial(decoder_pass, base.decoder, base.pool, w.num_nodes + 1, w.context_tokens)
    rounds = []
    for _ in range(num_rounds + _WARM_UPS):
        times = [time.perf_counter()]
        calibrate()
        times.append(time.perf_counter())
        for _ in range(w.num_levels - 1):
            fuzzy()
        times.append(time.perf_counter())
        draft.decoder.dismiss_followers()
        verify()
        times.append(time.perf_counter())
        base.decoder.dismiss_followers()
        rounds.append([1e3 * (time.perf_counter() - times[0]), *(1e3 * (b - a) for a, b in itertools.pairwise(times))])
    round_ms, calibrate_ms, fuzzy_ms, verify_ms = (typical(column) for column in zip(*rounds[_WARM_UPS:], strict=True))
    return RoundTimes(calibrate_ms, fuzzy_ms / (w.num_levels - 1), verify_ms, round_ms)
