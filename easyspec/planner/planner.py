"""Which way of running a pair of models on given GPUs makes rounds shortest for what they yield.

Base and draft share all GPUs and take turns, as in the paper. The verifier is tensor-parallel; the drafter runs in one
of the ways compared here. Every combination that fits the memory is costed; the one with most tokens per second is
recommended among those the service can run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from easyspec.errors import InvalidRequestError
from easyspec.parallel.layer_groups import LayerPlan, paper_plan, sequential_plan
from easyspec.planner.acceptance import (
    EXACT_ACCEPTANCE_RATE,
    LAYER_PARALLEL_SIZES,
    acceptance_rate,
    tokens_per_round,
)
from easyspec.planner.costs import CostModel, Load
from easyspec.planner.shape import ModelShape
from easyspec.speculation.parameters import MlpPlacement

# Left free for activations, graphs and the framework.
_USABLE_MEMORY = 0.9


@dataclass(frozen=True)
class Workload:
    """What a round is asked to do: levels below the root, nodes expanded per level, nodes in all, cached tokens.

    `overhead_us` is the gateway's share of a round; `kv_tokens` how many tokens the KV pools must hold.
    """

    num_levels: int = 5
    tree_width: int = 4
    num_nodes: int = 15
    context_tokens: int = 2048
    kv_tokens: int = 65_536
    exact_acceptance_rate: float = EXACT_ACCEPTANCE_RATE
    overhead_us: float = 600.0


@dataclass(frozen=True)
class DraftScheme:
    """One way to run the drafter: `num_ranks` GPUs, a layer plan, and what is split over the ranks."""

    name: str
    num_ranks: int
    plan: LayerPlan
    is_tensor_parallel: bool = False
    is_mlp_sharded: bool = False


@dataclass(frozen=True)
class RoundEstimate:
    """What a round takes and yields; times in milliseconds."""

    scheme: DraftScheme
    verifier_ranks: int
    calibrate_ms: float
    fuzzy_step_ms: float
    verify_ms: float
    round_ms: float
    overlapped_round_ms: float
    acceptance_rate: float
    tokens_per_round: float
    tokens_per_s: float


@dataclass(frozen=True)
class Plan:
    """All estimates, fastest first; what plain decoding takes; and what did not fit, with the reason."""

    plain_ms: float
    verifier_ranks: int
    estimates: tuple[RoundEstimate, ...]
    rejected: tuple[tuple[str, str], ...]

    @property
    def recommended(self) -> RoundEstimate | None:
        """The scheme with most tokens per second; None where plain decoding is faster than every round."""
        best = self.estimates[0] if self.estimates else None
        return best if best is not None and best.tokens_per_s > 1e3 / self.plain_ms else None


def make_plan(costs: CostModel, base: ModelShape, draft: ModelShape, num_gpus: int, workload: Workload) -> Plan:
    """Cost every scheme; InvalidRequestError if the base model fits in no way."""
    verifier_ranks = _verifier_ranks(costs, base, num_gpus, workload)
    plain_load = Load(1, workload.context_tokens)
    plain_ms = costs.tensor_parallel_us(base, plain_load, verifier_ranks) / 1e3
    estimates, rejected = [], []
    for scheme in draft_schemes(draft, num_gpus):
        missing = _missing_bytes(costs, base, draft, verifier_ranks, scheme, workload)
        if missing > 0:
            rejected.append((scheme.name, f"{missing / 2**30:.1f} GiB a GPU too little memory"))
        else:
            estimates.append(estimate_round(costs, base, draft, scheme, verifier_ranks, workload))
    estimates.sort(key=lambda estimate: -estimate.tokens_per_s)
    return Plan(plain_ms, verifier_ranks, tuple(estimates), tuple(rejected))


def draft_schemes(draft: ModelShape, num_gpus: int) -> Iterator[DraftScheme]:
    """Every way that the planner compares: exact on one rank, tensor-parallel, layer-parallel in three forms."""
    exact = sequential_plan(draft.num_layers)
    yield DraftScheme("TP-1", 1, exact)
    for ranks in draft.supported_ranks(num_gpus):
        if ranks > 1:
            yield DraftScheme(f"TP-{ranks}", ranks, exact, is_tensor_parallel=True)
    for size in LAYER_PARALLEL_SIZES:
        if size > draft.num_layers:
            continue
        paper = paper_plan(draft.num_layers, size, MlpPlacement.SEQUENTIAL)
        staged = paper_plan(draft.num_layers, size, MlpPlacement.STAGED)
        for ranks in sorted({1, min(size, num_gpus)}):
            yield DraftScheme(f"LP N={size} R={ranks}", ranks, paper)
            if ranks > 1 and ranks in draft.supported_ranks(num_gpus):
                yield DraftScheme(f"LP N={size} R={ranks} + sharded MLP", ranks, paper, is_mlp_sharded=True)
            yield DraftScheme(f"staged LP N={size} R={ranks}", ranks, staged)


def draft_pass_us(
    costs: CostModel, draft: ModelShape, scheme: DraftScheme, load: Load, *, is_calibration: bool
) -> float:
    """An exact or a fuzzy pass of the drafter.

    Layer-parallel ranks keep all layers and compute the exact pass whole, each by itself (docs/decisions/0015).
    """
    if scheme.is_tensor_parallel:
        return costs.tensor_parallel_us(draft, load, scheme.num_ranks)
    if is_calibration:
        return costs.tensor_parallel_us(draft, load, 1)
    return costs.layer_parallel_us(draft, load, scheme.plan, scheme.num_ranks, is_mlp_sharded=scheme.is_mlp_sharded)


def estimate_round(
    costs: CostModel,
    base: ModelShape,
    draft: ModelShape,
    scheme: DraftScheme,
    verifier_ranks: int,
    workload: Workload,
) -> RoundEstimate:
    """One round: calibrate, a step for every further level, verify.

    Overlapped, the exact pass runs in the verifier's shadow.
    """
    rate = acceptance_rate(workload.exact_acceptance_rate, scheme.plan)
    num_tokens = tokens_per_round(rate, workload.num_levels)
    calibrated = Load(max(1, round(num_tokens)), workload.context_tokens)
    level = Load(workload.tree_width, workload.context_tokens)
    calibrate_us = draft_pass_us(costs, draft, scheme, calibrated, is_calibration=True)
    fuzzy_us = draft_pass_us(costs, draft, scheme, level, is_calibration=False)
    verify_us = costs.tensor_parallel_us(base, Load(workload.num_nodes + 1, workload.context_tokens), verifier_ranks)
    fuzzy_total_us = (workload.num_levels - 1) * fuzzy_us
    round_us = calibrate_us + fuzzy_total_us + verify_us + workload.overhead_us
    overlapped_us = fuzzy_total_us + max(verify_us, calibrate_us) + workload.overhead_us
    return RoundEstimate(
        scheme=scheme,
        verifier_ranks=verifier_ranks,
        calibrate_ms=calibrate_us / 1e3,
        fuzzy_step_ms=fuzzy_us / 1e3,
        verify_ms=verify_us / 1e3,
        round_ms=round_us / 1e3,
        overlapped_round_ms=overlapped_us / 1e3,
        acceptance_rate=rate,
        tokens_per_round=num_tokens,
        tokens_per_s=1e6 * num_tokens / round_us,
    )


def _verifier_ranks(costs: CostModel, base: ModelShape, num_gpus: int, workload: Workload) -> int:
    """The tensor-parallel size that fits and makes a pass shortest."""
    fitting = [
        ranks
        for ranks in base.supported_ranks(num_gpus)
        if _base_bytes(base, ranks, workload) <= _USABLE_MEMORY * costs.device.memory_bytes
    ]
    if not fitting:
        needed = min(_base_bytes(base, ranks, workload) for ranks in base.supported_ranks(num_gpus)) / 2**30
        have = _USABLE_MEMORY * costs.device.memory_bytes / 2**30
        raise InvalidRequestError("gpus", num_gpus, f"more: the base needs {needed:.0f} GiB a GPU of {have:.0f}")
    load = Load(workload.num_nodes + 1, workload.context_tokens)
    return min(fitting, key=lambda ranks: costs.tensor_parallel_us(base, load, ranks))


def _base_bytes(base: ModelShape, ranks: int, workload: Workload) -> float:
    cached = base.num_layers * base.kv_bytes(workload.kv_tokens) / min(ranks, base.num_kv_heads)
    return base.weight_bytes / ranks + cached


def _missing_bytes(
    costs: CostModel, base: ModelShape, draft: ModelShape, verifier_ranks: int, scheme: DraftScheme, workload: Workload
) -> float:
    """Bytes by which the busiest GPU, which runs both roles, is too small; 0 or less if it fits."""
    ranks = scheme.num_ranks if scheme.is_tensor_parallel else 1
    cached = draft.num_layers * draft.kv_bytes(workload.kv_tokens) / min(ranks, draft.num_kv_heads)
    needed = _base_bytes(base, verifier_ranks, workload) + draft.weight_bytes / ranks + cached
    return needed - _USABLE_MEMORY * costs.device.memory_bytes
