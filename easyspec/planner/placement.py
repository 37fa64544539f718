"""How the services of one machine use its GPUs: the planner's answer as ranks and flags, and why in one line.

What flags say is kept, and the rest is planned around it. On a machine without GPUs each role gets one rank: a
collective of processes on a CPU costs more than what it shares out (docs/planning.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from easyspec.errors import InvalidRequestError
from easyspec.planner.costs import CostModel
from easyspec.planner.gpus import Gpu, known_device
from easyspec.planner.hardware import SERVICE, Device, service_stacks
from easyspec.planner.memory import fitting_verifier_ranks, kv_tokens_that_fit, missing_bytes
from easyspec.planner.planner import Plan, Workload, best_verifier_ranks, make_plan
from easyspec.planner.scheme import DraftScheme, draft_schemes
from easyspec.planner.shape import ModelShape

# KV pools worth planning for, in tokens: as many as the planner assumes, or what small GPUs have room for.
_KV_TOKENS = (65_536, 16_384, 4096)
# A larger pool is never filled, and its slots are counted on the host.
_MOST_KV_TOKENS = 2**20
_SMALLEST_WORKLOAD = Workload(kv_tokens=_KV_TOKENS[-1])


@dataclass(frozen=True)
class Wishes:
    """What was asked for, by flags or in the environment; None leaves it to the plan."""

    tensor_parallel_size: int | None = None
    drafter_ranks: int | None = None
    layer_parallel_size: int | None = None
    mlp: str | None = None
    rank_placement: str | None = None

    @property
    def is_complete(self) -> bool:
        """Nothing is left to plan."""
        return all(value is not None for value in vars(self).values())

    def admits(self, scheme: DraftScheme) -> bool:
        """Whether a drafter run by `scheme` does what was asked for."""
        is_grouped, is_alone = scheme.layer_parallel_size > 1, scheme.num_ranks == 1
        return (
            self.drafter_ranks in (None, scheme.num_ranks)
            and self.layer_parallel_size in (None, scheme.layer_parallel_size)
            and (self.mlp in (None, scheme.plan.mlp.value) or not is_grouped)
            and (self.rank_placement in (None, scheme.placement) or is_alone)
        )

    def __str__(self) -> str:
        given = [(item.name, getattr(self, item.name)) for item in fields(self)]
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in given if value is not None)


@dataclass(frozen=True)
class Placement:
    """Ranks of each role, the drafter's layer plan and KV pools (None: the services' defaults), and why."""

    verifier_ranks: int
    drafter_ranks: int
    reason: str
    layer_flags: Mapping[str, str] = field(default_factory=dict)
    num_kv_slots: int | None = None
    has_drafter: bool = True
    is_for_gpus: bool = False

    def __str__(self) -> str:
        drafter = f"drafter on {_ranks(self.drafter_ranks)}" if self.has_drafter else "no drafter"
        flags = "".join(f" {flag} {value}" for flag, value in self.layer_flags.items())
        return f"verifier on {_ranks(self.verifier_ranks)}, {drafter}{flags}: {self.reason}"


def place(base: ModelShape, draft: ModelShape | None, gpus: Sequence[Gpu], wishes: Wishes) -> Placement:
    """Plan for these GPUs, at least one; InvalidRequestError if they do not hold the base in any way."""
    device = known_device(gpus)
    placed = _fewest_ranks(base, draft, gpus, wishes) if device is None else _fastest(base, draft, device, gpus, wishes)
    return replace(placed, is_for_gpus=True)


def _fastest(
    base: ModelShape, draft: ModelShape | None, device: Device, gpus: Sequence[Gpu], wishes: Wishes
) -> Placement:
    costs = CostModel(device, *service_stacks(SERVICE))
    if draft is None:
        ranks = wishes.tensor_parallel_size or best_verifier_ranks(costs, base, len(gpus), _SMALLEST_WORKLOAD)
        return Placement(ranks, 1, f"fastest {_by_the_model(device, gpus, wishes)}", has_drafter=False)
    plan = _plan_with_room(costs, base, draft, len(gpus), wishes)
    admitted = [estimate for estimate in plan.estimates if wishes.admits(estimate.scheme)]
    if not admitted:
        reason = "as asked, which is nothing that the planner compares"
        if not plan.estimates:
            name, missing = plan.rejected[0]
            reason = f"no draft fits beside the base, {name} has {missing}"
        placed = replace(as_asked(wishes, reason), verifier_ranks=plan.verifier_ranks)
        schemes = [estimate.scheme for estimate in plan.estimates]
    else:
        best = admitted[0]
        gain = best.tokens_per_s * plan.plain_ms / 1e3
        reason = f"{best.round_ms:.2f} ms a round of {best.tokens_per_round:.1f} tokens, {gain:.2f} x plain decoding,"
        if gain <= 1:
            reason = f"the best of drafts, though none beats plain decoding ({plan.plain_ms:.2f} ms a token)"
        reason = f"{reason} {_by_the_model(device, gpus, wishes)}"
        flags = {"--layer-parallel-size": str(best.scheme.layer_parallel_size)}
        if best.scheme.layer_parallel_size > 1:
            flags["--mlp"] = best.scheme.plan.mlp.value
        if best.scheme.num_ranks > 1:
            flags["--rank-placement"] = best.scheme.placement
        placed = Placement(plan.verifier_ranks, best.scheme.num_ranks, reason, flags)
        schemes = [best.scheme]
    fitting = [kv_tokens_that_fit(device.memory_bytes, base, draft, plan.verifier_ranks, scheme) for scheme in schemes]
    num_kv_slots = min([*fitting, _MOST_KV_TOKENS]) if fitting else None
    return replace(placed, num_kv_slots=num_kv_slots, has_drafter=bool(fitting))


def as_asked(wishes: Wishes, reason: str) -> Placement:
    """What was asked for, otherwise one rank and the services' own defaults."""
    flags = {
        "--layer-parallel-size": wishes.layer_parallel_size,
        "--mlp": wishes.mlp,
        "--rank-placement": wishes.rank_placement,
    }
    given = {flag: str(value) for flag, value in flags.items() if value is not None}
    return Placement(wishes.tensor_parallel_size or 1, wishes.drafter_ranks or 1, reason, given)


def _plan_with_room(costs: CostModel, base: ModelShape, draft: ModelShape, num_gpus: int, wishes: Wishes) -> Plan:
    """A plan with KV pools as large as a draft still fits beside."""
    for kv_tokens in _KV_TOKENS[:-1]:
        try:
            plan = make_plan(costs, base, draft, num_gpus, Workload(kv_tokens=kv_tokens), wishes.tensor_parallel_size)
        except InvalidRequestError:
            continue
        if any(wishes.admits(estimate.scheme) for estimate in plan.estimates):
            return plan
    return make_plan(costs, base, draft, num_gpus, _SMALLEST_WORKLOAD, wishes.tensor_parallel_size)


def _fewest_ranks(base: ModelShape, draft: ModelShape | None, gpus: Sequence[Gpu], wishes: Wishes) -> Placement:
    """For GPUs of which no speed is known: as few as hold the models, since a link may be slow."""
    memory_bytes, kv_tokens = min(gpu.memory_bytes for gpu in gpus), _KV_TOKENS[-1]
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    reason = f"the fewest that hold the models, as no speed of {names} is known" + _beside(wishes)
    asked = as_asked(wishes, reason)
    if wishes.tensor_parallel_size is not None:
        candidates = [wishes.tensor_parallel_size]
    else:
        candidates = fitting_verifier_ranks(memory_bytes, base, len(gpus), kv_tokens)
    if draft is None:
        return replace(asked, verifier_ranks=candidates[0], has_drafter=False)
    scheme = next(draft_schemes(draft, 1))  # sequential, on one GPU
    for ranks in candidates:
        if missing_bytes(memory_bytes, base, draft, ranks, scheme, kv_tokens) <= 0:
            slots = min(kv_tokens_that_fit(memory_bytes, base, draft, ranks, scheme), _MOST_KV_TOKENS)
            # A layer plan of the drafter's own choice would hold weights twice.
            flags = {"--layer-parallel-size": "1", **asked.layer_flags}
            return replace(asked, verifier_ranks=ranks, layer_flags=flags, num_kv_slots=slots)
    return replace(asked, verifier_ranks=candidates[-1], has_drafter=False, reason="the draft does not fit beside it")


def _by_the_model(device: Device, gpus: Sequence[Gpu], wishes: Wishes) -> str:
    return f"by the cost model of {len(gpus)} x {device.name}" + _beside(wishes)


def _beside(wishes: Wishes) -> str:
    return f" and {wishes}" if str(wishes) else ""


def _ranks(num_ranks: int) -> str:
    return f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
