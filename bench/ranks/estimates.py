"""The planner's estimates from measured constants, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bench.harness.tables import Row
from bench.ranks.constants import ATTENTION_OPERATIONS, MLP_OPERATIONS, Constants
from bench.ranks.passes import BASE, CALIBRATED_ROWS, DRAFT, WORKLOAD
from easyspec.planner.costs import CostModel, Load
from easyspec.planner.hardware import Device, Stack
from easyspec.planner.planner import draft_pass_us
from easyspec.planner.scheme import DraftScheme


def cost_model(constants: Constants) -> CostModel:
    """The planner's cost model with every constant measured, but for the operations of a layer, which are counted."""
    device = Device(
        name=f"one of {constants.num_ranks} ranks on this CPU",
        memory_bytes=0.0,
        memory_bytes_per_s=constants.memory_bytes_per_s,
        flops_per_s=constants.flops_per_s,
        link_bytes_per_s=constants.link_bytes_per_s,
        source="measured",
    )
    stack = Stack(
        name="gloo",
        launch_us=0.0,
        kernel_floor_us=constants.op_us,
        attention_kernels=ATTENTION_OPERATIONS,
        mlp_kernels=MLP_OPERATIONS,
        collective_us=constants.collective_us,
        order_us=constants.order_us,
        memory_efficiency=1.0,
        compute_efficiency=1.0,
        source="measured",
    )
    return CostModel(device, stack)


def round_rows(constants: Constants, scheme: DraftScheme, measured_ms: Mapping[str, float]) -> Iterator[Row]:
    """Estimates of a round's parts beside the measurement, milliseconds; a ratio above 1: the model is too slow."""
    costs, w = cost_model(constants), WORKLOAD
    calibrate, level = Load(CALIBRATED_ROWS, w.context_tokens), Load(w.tree_width, w.context_tokens)
    calibrate_ms = draft_pass_us(costs, DRAFT, scheme, calibrate, is_calibration=True) / 1e3
    fuzzy_ms = draft_pass_us(costs, DRAFT, scheme, level, is_calibration=False) / 1e3
    verify = Load(w.num_nodes + 1, w.context_tokens)
    verify_ms = costs.tensor_parallel_us(BASE, verify, constants.num_ranks) / 1e3
    round_ms = calibrate_ms + (w.num_levels - 1) * fuzzy_ms + verify_ms
    figures = {"calibrate": calibrate_ms, "step": fuzzy_ms, "verify": verify_ms, "round": round_ms}
    for figure, model_ms in figures.items():
        measured = measured_ms[figure]
        times = {"model_ms": model_ms, "measured_ms": measured, "ratio": model_ms / measured}
        yield {"num_ranks": constants.num_ranks, "scheme": scheme.name, "figure": figure, **times}
