"""Ways to run a draft model on some GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from easyspec.parallel.layer_groups import LayerPlan, paper_plan, sequential_plan
from easyspec.planner.acceptance import LAYER_PARALLEL_SIZES
from easyspec.planner.shape import ModelShape
from easyspec.speculation.parameters import MlpPlacement


@dataclass(frozen=True)
class DraftScheme:
    """One way to run the drafter: `num_ranks` GPUs, a layer plan, and what is split over the ranks."""

    name: str
    num_ranks: int
    plan: LayerPlan
    layer_parallel_size: int = 1
    is_tensor_parallel: bool = False
    is_mlp_sharded: bool = False

    @property
    def placement(self) -> str:
        """The drafter's --rank-placement."""
        if self.is_tensor_parallel:
            return "tensor"
        return "layers-sharded-mlp" if self.is_mlp_sharded else "layers"


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
        # Ranks of which the busiest has fewer layers of a group than with one rank less.
        for ranks in sorted({-(-size // most) for most in range(1, size + 1)} & {*range(1, num_gpus + 1)}):
            yield DraftScheme(f"LP N={size} R={ranks}", ranks, paper, size)
            if ranks > 1 and ranks in draft.supported_ranks(num_gpus):
                yield DraftScheme(f"LP N={size} R={ranks} + sharded MLP", ranks, paper, size, is_mlp_sharded=True)
            yield DraftScheme(f"staged LP N={size} R={ranks}", ranks, staged, size)
