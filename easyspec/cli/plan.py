"""`easyspec plan`: the cost model's answer as tables or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from easyspec.planner.costs import CostModel
from easyspec.planner.planner import Plan, RoundEstimate
from easyspec.planner.validation import Comparison

_NUM_SHOWN = 12
_FILE_WIDTH = 120


def print_plan(plan: Plan, title: str, *, shows_all: bool) -> None:
    """The fastest schemes, the plain ones they are compared with, and what to choose."""
    console = _console()
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("drafter", no_wrap=True)
    for column in ("calibrate ms", "step ms", "verify ms", "round ms", "ahead ms", "rate", "tokens/s", "x plain"):
        table.add_column(column, justify="right")
    for estimate in _shown(plan, shows_all):
        passes_ms = (estimate.calibrate_ms, estimate.fuzzy_step_ms, estimate.verify_ms)
        figures = (*passes_ms, estimate.round_ms, estimate.ahead_round_ms, estimate.acceptance_rate)
        gain = estimate.tokens_per_s * plan.plain_ms / 1e3
        shown = *(f"{figure:.2f}" for figure in figures), f"{estimate.tokens_per_s:.0f}", f"{gain:.2f}"
        table.add_row(estimate.scheme.name, *shown)
    console.print(table)
    console.print("ahead: a round on average if drafting ahead guesses so many verdicts as --ahead-hit-rate says")
    console.print(f"plain decoding, verifier TP-{plan.verifier_ranks}: {plan.plain_ms:.2f} ms a token")
    for name, reason in plan.rejected:
        console.print(f"left out: {name}: {reason}")
    console.print(f"recommended: {_recommendation(plan)}")


def plan_as_json(plan: Plan, costs: CostModel) -> str:
    """Everything that the table shows and the constants it rests on."""
    recommended = plan.recommended
    document = {
        "device": dataclasses.asdict(costs.device),
        "stack": dataclasses.asdict(costs.stack),
        "stack_of_ranks": dataclasses.asdict(costs.of_role(2).stack),
        "plain_ms": plan.plain_ms,
        "verifier_ranks": plan.verifier_ranks,
        "recommended": _as_dict(recommended) if recommended is not None else None,
        "estimates": [_as_dict(estimate) for estimate in plan.estimates],
        "rejected": [{"scheme": name, "reason": reason} for name, reason in plan.rejected],
    }
    return json.dumps(document, indent=2)


def print_validation(comparisons: Iterable[Comparison]) -> None:
    title = "arXiv 2502.02493, Table 2: seconds per 100 tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("data", "figure"):
        table.add_column(column)
    for column in ("paper", "model", "error"):
        table.add_column(column, justify="right")
    worst = 0.0
    for comparison in comparisons:
        worst = max(worst, abs(comparison.error))
        shown = f"{comparison.paper_s:.2f}", f"{comparison.model_s:.2f}", f"{comparison.error:+.1%}"
        table.add_row(comparison.data, comparison.figure, *shown)
    console = _console()
    console.print(table)
    console.print(f"largest error: {worst:.1%}")


def _console() -> Console:
    """As wide as the terminal; into a file or a pipe as wide as the tables need."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_FILE_WIDTH)


def _shown(plan: Plan, shows_all: bool) -> list[RoundEstimate]:
    if shows_all:
        return list(plan.estimates)
    references = [estimate for estimate in plan.estimates[_NUM_SHOWN:] if estimate.scheme.name == "TP-1"]
    return [*plan.estimates[:_NUM_SHOWN], *references]


def _recommendation(plan: Plan) -> str:
    best = plan.recommended
    if best is None:
        return "plain decoding; no draft earns what it costs here"
    scheme = best.scheme
    if scheme.plan.is_sequential:
        how = f"every layer in turn, tensor-parallel over {scheme.num_ranks}" if scheme.num_ranks > 1 else "on one GPU"
    else:
        largest = max(len(group) for group in scheme.plan.groups)
        mlp = "sharded sequential" if scheme.is_mlp_sharded else scheme.plan.mlp.value
        how = f"{largest} layers at once over {scheme.num_ranks} GPUs, MLPs {mlp}"
    return f"{scheme.name}: verifier TP-{best.verifier_ranks}; drafter runs {how}"


def _as_dict(estimate: RoundEstimate) -> dict[str, Any]:
    scheme = estimate.scheme
    of_scheme = {
        "name": scheme.name,
        "num_ranks": scheme.num_ranks,
        "layer_groups": str(scheme.plan),
        "mlp": scheme.plan.mlp.value,
        "is_tensor_parallel": scheme.is_tensor_parallel,
        "is_mlp_sharded": scheme.is_mlp_sharded,
    }
    return vars(estimate) | {"scheme": of_scheme}
