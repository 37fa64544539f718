"""Which way of running a pair of models on given GPUs makes rounds shortest for what they yield.

Base and draft share all GPUs and take turns, as in the paper. The verifier is tensor-parallel; the drafter runs in one
of the ways compared here. Every combination that fits the memory is costed; the one with most tokens per second is
recommended among those the service can run.
"""

from __future__ import annotations

from dataclasses import dataclass

from easyspec.planner.acceptance import EXACT_ACCEPTANCE_RATE, acceptance_rate, tokens_per_round
from easyspec.planner.costs import CostModel, Load
from easyspec.planner.memory import fitting_verifier_ranks, missing_bytes
from easyspec.planner.scheme import DraftScheme, draft_schemes
from easyspec.planner.shape import ModelShape


@dataclass(frozen=True)
class Workload:
    """What a round is asked to do: levels below the root, nodes expanded per level, nodes in all, cached tokens.

    `overhead_us` is the gateway's share of a round; `kv_tokens` how many tokens the KV pools must hold,
    `ahead_hit_rate` the share of verdicts that a drafter that goes ahead has guessed.
    """

    num_levels: int = 5
    tree_width: int = 4
    num_nodes: int = 15
    context_tokens: int = 2048
    kv_tokens: int = 65_536
    exact_acceptance_rate: float = EXACT_ACCEPTANCE_RATE
    overhead_us: float = 600.0
    ahead_hit_rate: float = 0.5


@dataclass(frozen=True)
class RoundEstimate:
    """What a round takes and yields; times in milliseconds."""

    scheme: DraftScheme
    verifier_ranks: int
    calibrate_ms: float
    fuzzy_step_ms: float
    verify_ms: float
    round_ms: float
    ahead_round_ms: float
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


def make_plan(
    costs: CostModel,
    base: ModelShape,
    draft: ModelShape,
    num_gpus: int,
    workload: Workload,
    verifier_ranks: int | None = None,
) -> Plan:
    """Cost every scheme, with `verifier_ranks` or the best number; InvalidRequestError if the base fits in no way."""
    if verifier_ranks is None:
        verifier_ranks = best_verifier_ranks(costs, base, num_gpus, workload)
    plain_load = Load(1, workload.context_tokens)
    plain_ms = verify_pass_us(costs, base, plain_load, verifier_ranks) / 1e3
    estimates, rejected = [], []
    for scheme in draft_schemes(draft, num_gpus):
        missing = missing_bytes(costs.device.memory_bytes, base, draft, verifier_ranks, scheme, workload.kv_tokens)
        if missing > 0:
            rejected.append((scheme.name, f"{missing / 2**30:.1f} GiB a GPU too little memory"))
        else:
            estimates.append(estimate_round(costs, base, draft, scheme, verifier_ranks, workload))
    estimates.sort(key=lambda estimate: -estimate.tokens_per_s)
    return Plan(plain_ms, verifier_ranks, tuple(estimates), tuple(rejected))


def verify_pass_us(costs: CostModel, base: ModelShape, load: Load, num_ranks: int) -> float:
    return costs.of_role(num_ranks).tensor_parallel_us(base, load, num_ranks)


def draft_pass_us(
    costs: CostModel, draft: ModelShape, scheme: DraftScheme, load: Load, *, is_calibration: bool
) -> float:
    """An exact or a fuzzy pass of the drafter.

    Layer-parallel ranks keep all layers and compute the exact pass whole, each by itself (docs/decisions/0015).
    """
    costs = costs.of_role(scheme.num_ranks)
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

    Drafting ahead, a verdict that was guessed finds the next tree, as far as it has grown beside the verifier.
    """
    rate = acceptance_rate(workload.exact_acceptance_rate, scheme.plan)
    num_tokens = tokens_per_round(rate, workload.num_levels)
    calibrated = Load(max(1, round(num_tokens)), workload.context_tokens)
    level = Load(workload.tree_width, workload.context_tokens)
    calibrate_us = draft_pass_us(costs, draft, scheme, calibrated, is_calibration=True)
    fuzzy_us = draft_pass_us(costs, draft, scheme, level, is_calibration=False)
    verify_us = verify_pass_us(costs, base, Load(workload.num_nodes + 1, workload.context_tokens), verifier_ranks)
    level_us = draft_pass_us(costs, draft, scheme, level, is_calibration=True)
    fuzzy_total_us = (workload.num_levels - 1) * fuzzy_us
    round_us = calibrate_us + fuzzy_total_us + verify_us + workload.overhead_us
    ahead_us = calibrate_us + level_us + fuzzy_total_us  # the path, the bonus tokens, and the further levels
    hit_us = max(verify_us, ahead_us) + workload.overhead_us
    ahead_round_us = workload.ahead_hit_rate * hit_us + (1.0 - workload.ahead_hit_rate) * round_us
    return RoundEstimate(
        scheme=scheme,
        verifier_ranks=verifier_ranks,
        calibrate_ms=calibrate_us / 1e3,
        fuzzy_step_ms=fuzzy_us / 1e3,
        verify_ms=verify_us / 1e3,
        round_ms=round_us / 1e3,
        ahead_round_ms=min(ahead_round_us, round_us) / 1e3,
        acceptance_rate=rate,
        tokens_per_round=num_tokens,
        tokens_per_s=1e6 * num_tokens / round_us,
    )


def best_verifier_ranks(costs: CostModel, base: ModelShape, num_gpus: int, workload: Workload) -> int:
    """The tensor-parallel size that fits and makes a pass shortest; InvalidRequestError if none fits."""
    fitting = fitting_verifier_ranks(costs.device.memory_bytes, base, num_gpus, workload.kv_tokens)
    load = Load(workload.num_nodes + 1, workload.context_tokens)
    return min(fitting, key=lambda ranks: verify_pass_us(costs, base, load, ranks))
