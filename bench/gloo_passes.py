"""What passes and rounds of real ranks take: every rank calls this, rank 0 leads as in the services.

Base and draft live in the same ranks and take turns; when rank 0 turns to the other model it dismisses the followers
of the one, which is one broadcast a turn that services, whose roles are processes of their own, do not make.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench.gloo_models import NUM_SLOTS, chain, decoder_pass, typical
from easyspec.model.attention import flat_attention
from easyspec.model.config import ModelConfig, load_config
from easyspec.model.decoder import Decoder
from easyspec.model.distributed_group import DistributedLayerGroup, RankPlacement, sharded_mlp
from easyspec.model.kv_cache import KVPool
from easyspec.model.layers import LayerGroup, LayerWeights, PassState, unit_rms
from easyspec.model.row_probe import tile_products
from easyspec.parallel.ranks import Ranks
from easyspec.planner.planner import Workload
from easyspec.planner.scheme import DraftScheme
from easyspec.speculation.parameters import MlpPlacement

CPU = torch.device("cpu")
CALIBRATED_ROWS = 5
WORKLOAD = Workload(num_levels=5, tree_width=4, num_nodes=15, context_tokens=256, overhead_us=0.0)
_WARM_UPS = 3

REPLICATED, BY_OWNER, SHARDED_MLPS, TENSOR_PARALLEL = (
    "replicated",
    "attention by its owner",
    "replicated attention, sharded MLPs",
    "tensor-parallel",
)


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


def load(folder: Path, ranks: Ranks, *, is_exact: bool, placement: RankPlacement = RankPlacement.TENSOR) -> Model:
    """This rank's part, as `placement` says."""
    decoder = Decoder(folder, load_config(folder), CPU, is_exact=is_exact, ranks=ranks, placement=placement)
    if is_exact:
        tile_products(decoder)
    return Model(decoder, KVPool(decoder.layer_config, NUM_SLOTS, CPU))


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


def measure_calibrations(draft: Model, ranks: Ranks, num_passes: int) -> dict[str, float]:
    """Milliseconds of ways to compute the exact pass over layer-parallel ranks, without orders; every rank calls it.

    `draft` is placed by LAYERS. In the owner's way an all-gather stands for the broadcast, with the same latency and R
    times its bytes, and rank 0 for every owner.
    """
    decoder, config, layers = draft.decoder, draft.decoder.config, range(draft.decoder.config.num_layers)
    weights = decoder._layers
    whole = [_single_layer(config, layer, weights[layer]) for layer in layers]
    shards = [sharded_mlp(config, weights[layer], ranks) for layer in layers]
    owned = [
        DistributedLayerGroup(
            config,
            range(layer, layer + 1),
            [weights[layer]],
            MlpPlacement.SEQUENTIAL,
            flat_attention,
            ranks,
            [partial(whole[layer].mlp_output, 0)],
        )
        for layer in layers
    ]

    def with_sharded_mlp(layer: int, hidden: torch.Tensor, state: PassState) -> torch.Tensor:
        hidden = hidden + whole[layer].attention_outputs(hidden, state)[0]
        return hidden + shards[layer](hidden)

    ways: dict[str, _Layer] = {
        REPLICATED: lambda layer, hidden, state: whole[layer](hidden, state),
        BY_OWNER: lambda layer, hidden, state: owned[layer](hidden, state),
        SHARDED_MLPS: with_sharded_mlp,
    }
    return {name: _median_ms(draft, way, num_passes) for name, way in ways.items()}


_Layer = Callable[[int, torch.Tensor, PassState], torch.Tensor]


def _single_layer(config: ModelConfig, layer: int, weights: LayerWeights) -> LayerGroup:
    return LayerGroup(config, range(layer, layer + 1), [weights], MlpPlacement.SEQUENTIAL, flat_attention)


def _median_ms(draft: Model, layer_pass: _Layer, num_passes: int) -> float:
    decoder, times = draft.decoder, []
    for _ in range(num_passes + _WARM_UPS):
        started = time.perf_counter()
        layout = decoder.lay_out([chain(CALIBRATED_ROWS, WORKLOAD.context_tokens)])
        hidden, state = decoder._begin(layout, draft.pool)
        for layer in range(decoder.config.num_layers):
            hidden = layer_pass(layer, hidden, state)
        decoder.logits(unit_rms(hidden, decoder.config.rms_norm_eps), range(CALIBRATED_ROWS))
        times.append(1e3 * (time.perf_counter() - started))
    return typical(times[_WARM_UPS:])
