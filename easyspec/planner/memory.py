"""What a GPU holds when it runs its part of both models: weights, twice where layers run at once, and KV pools."""

from __future__ import annotations

from easyspec.errors import InvalidRequestError
from easyspec.planner.scheme import DraftScheme
from easyspec.planner.shape import ModelShape
from easyspec.speculation.parameters import MlpPlacement

# Left free for activations, graphs and the framework.
_USABLE_MEMORY = 0.9


def fitting_verifier_ranks(memory_bytes: float, base: ModelShape, num_gpus: int, kv_tokens: int) -> list[int]:
    """Tensor-parallel sizes that fit, ascending; InvalidRequestError if there are none."""
    supported = base.supported_ranks(num_gpus)
    needed = {ranks: base.weight_bytes / ranks + _base_kv_bytes(base, ranks, kv_tokens) for ranks in supported}
    usable = _USABLE_MEMORY * memory_bytes
    fitting = [ranks for ranks in supported if needed[ranks] <= usable]
    if not fitting:
        allowed = f"more: the base needs {min(needed.values()) / 2**30:.0f} GiB a GPU of {usable / 2**30:.0f}"
        raise InvalidRequestError("gpus", num_gpus, allowed)
    return fitting


def missing_bytes(
    memory_bytes: float, base: ModelShape, draft: ModelShape, verifier_ranks: int, scheme: DraftScheme, kv_tokens: int
) -> float:
    """Bytes by which the busiest GPU, which runs both roles, is too small; 0 or less if it fits."""
    needed = base.weight_bytes / verifier_ranks + _draft_weight_bytes(draft, scheme)
    needed += _base_kv_bytes(base, verifier_ranks, kv_tokens) + _draft_kv_bytes(draft, scheme, kv_tokens)
    return needed - _USABLE_MEMORY * memory_bytes


def kv_tokens_that_fit(
    memory_bytes: float, base: ModelShape, draft: ModelShape, verifier_ranks: int, scheme: DraftScheme
) -> int:
    """Tokens for which each role has KV memory where both share their GPUs; the two pools hold equally many."""
    free = _USABLE_MEMORY * memory_bytes - base.weight_bytes / verifier_ranks - _draft_weight_bytes(draft, scheme)
    token_bytes = _base_kv_bytes(base, verifier_ranks, 1) + _draft_kv_bytes(draft, scheme, 1)
    return max(0, int(free / token_bytes))


def _base_kv_bytes(base: ModelShape, num_ranks: int, num_tokens: int) -> float:
    """On one of the verifier's ranks; KV heads are held twice where there are fewer than ranks."""
    return base.num_layers * base.kv_bytes(num_tokens) / min(num_ranks, base.num_kv_heads)


def _draft_weight_bytes(draft: ModelShape, scheme: DraftScheme) -> float:
    """On the drafter's busiest rank.

    Layer-parallel ranks keep all layers for the exact pass, and those they own of each group a second time, side by
    side: attention, and staged MLPs; of sharded MLPs each rank has its part a second time.
    """
    if scheme.is_tensor_parallel:
        return draft.weight_bytes / scheme.num_ranks
    copied = 0.0
    for group in scheme.plan.groups:
        if len(group) == 1:
            continue
        own_layers = -(-len(group) // scheme.num_ranks)
        copied += own_layers * draft.attention_parameters
        if scheme.plan.mlp is MlpPlacement.STAGED:
            copied += own_layers * draft.mlp_parameters
        elif scheme.is_mlp_sharded:
            copied += len(group) * draft.mlp_parameters / scheme.num_ranks
    return draft.weight_bytes + draft.bytes_per_value * copied


def _draft_kv_bytes(draft: ModelShape, scheme: DraftScheme, num_tokens: int) -> float:
    ranks = scheme.num_ranks if scheme.is_tensor_parallel else 1
    return draft.num_layers * draft.kv_bytes(num_tokens) / min(ranks, draft.num_kv_heads)
