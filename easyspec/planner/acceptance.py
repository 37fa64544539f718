"""How much a layer plan costs in acceptance, for pairs that were not measured.

The rate is accepted levels / drafted levels. An exact draft's default is the mean of the paper's Table 2 (arXiv
2502.02493, five data sets, temperature 0); at N = 4 with sequential MLPs the same table gives the factor. Other N, and
staged MLPs, are scaled by how often the plans agreed with the exact model in our prototype (docs/planning.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from easyspec.parallel.layer_groups import LayerPlan
from easyspec.speculation.parameters import MlpPlacement

EXACT_ACCEPTANCE_RATE = 0.92

_FACTORS: Mapping[MlpPlacement, Mapping[int, float]] = MappingProxyType(
    {
        MlpPlacement.SEQUENTIAL: MappingProxyType({1: 1.0, 2: 0.985, 3: 0.965, 4: 0.946, 6: 0.91}),
        MlpPlacement.STAGED: MappingProxyType({1: 1.0, 2: 0.98, 3: 0.95, 4: 0.90, 6: 0.85}),
    }
)
LAYER_PARALLEL_SIZES = tuple(size for size in _FACTORS[MlpPlacement.SEQUENTIAL] if size > 1)


def acceptance_rate(exact_rate: float, plan: LayerPlan) -> float:
    """Accepted / drafted levels under `plan`, given the rate of the same draft executed exactly.

    Sizes between the tabled ones take the next larger one's factor; beyond the last nothing is known to pay.
    """
    largest = max(len(group) for group in plan.groups)
    factors = _FACTORS[plan.mlp]
    size = min((tabled for tabled in factors if tabled >= largest), default=max(factors))
    return exact_rate * factors[size]


def tokens_per_round(rate: float, num_levels: int) -> float:
    """Accepted tokens and the bonus token."""
    return 1.0 + rate * num_levels
