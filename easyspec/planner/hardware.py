"""What the cost model knows about devices and software stacks: one table, every figure with its source.

Nothing here is measured by the planner itself. Rates are per second, sizes in bytes, times in microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from easyspec.errors import InvalidRequestError


@dataclass(frozen=True)
class Device:
    """One accelerator. `link_bytes_per_s` is what it sends to its neighbours in one direction, all links together."""

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    source: str


@dataclass(frozen=True)
class Stack:
    """How kernels and collectives get onto the device.

    `launch_us` is the host's time per kernel, which bounds a pass that is not captured in a graph; `kernel_floor_us` is
    the least a kernel takes on the device. `attention_kernels` and `mlp_kernels` are kernels per layer, norms and
    residuals included. `collective_us` is the latency of one all-reduce or all-gather of a few kilobytes, `order_us` of
    the broadcast with which rank 0 begins a pass (None: as any collective).
    `memory_efficiency` is the share of the datasheet's bandwidth that a product of few rows reaches.
    """

    name: str
    launch_us: float
    kernel_floor_us: float
    attention_kernels: int
    mlp_kernels: int
    collective_us: float
    memory_efficiency: float
    compute_efficiency: float
    source: str
    order_us: float | None = None


_GIB = 2.0**30

DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        device.name: device
        for device in (
            Device("a100-40gb", 40 * _GIB, 1555e9, 312e12, 300e9, "NVIDIA A100 datasheet, SXM, dense bf16"),
            Device("a100", 80 * _GIB, 2039e9, 312e12, 300e9, "NVIDIA A100 datasheet, SXM 80 GB, dense bf16"),
            Device("a100-pcie", 80 * _GIB, 1935e9, 312e12, 32e9, "NVIDIA A100 datasheet, PCIe 4.0 x16, dense bf16"),
            Device("h100", 80 * _GIB, 3350e9, 989e12, 450e9, "NVIDIA H100 datasheet, SXM, dense bf16"),
            Device("h100-pcie", 80 * _GIB, 2000e9, 756e12, 64e9, "NVIDIA H100 datasheet, PCIe 5.0 x16, dense bf16"),
            Device("h200", 141e9, 4800e9, 989e12, 450e9, "NVIDIA H200 datasheet, dense bf16"),
            Device("b200", 180e9, 8000e9, 2250e12, 900e9, "NVIDIA DGX B200 datasheet per GPU, dense bf16"),
            Device("l4", 24 * _GIB, 300e9, 121e12, 32e9, "NVIDIA L4 datasheet, PCIe 4.0 x16, dense bf16"),
            Device("l40s", 48 * _GIB, 864e9, 362e12, 32e9, "NVIDIA L40S datasheet, PCIe 4.0 x16, dense bf16"),
        )
    }
)

_GRAPHS = Stack(
    name="graphs",
    launch_us=0.0,
    kernel_floor_us=2.5,
    attention_kernels=24,
    mlp_kernels=13,
    collective_us=13.0,
    memory_efficiency=0.85,
    compute_efficiency=0.6,
    source="an engine of captured passes with 37 kernels a layer, which this service has had; 2-4 us a small kernel; "
    "an all-reduce on 8 GPUs takes 12-15 us in decoding; copies reach 0.9 of the datasheet",
)
_EAGER = replace(
    _GRAPHS,
    name="eager",
    launch_us=6.0,
    collective_us=25.0,
    source="the same without captures, and about 6 us of host time a kernel (assumed)",
)
_PAPER = Stack(
    name="paper",
    launch_us=17.5,
    kernel_floor_us=2.5,
    attention_kernels=35,
    mlp_kernels=14,
    collective_us=50.0,
    memory_efficiency=0.8,
    compute_efficiency=0.6,
    source="arXiv 2502.02493, Table 2: kernels of transformers' eager Llama layer, counted; launch and collective "
    "fitted to its drafting columns, nothing to its verification columns",
)
STACKS: Mapping[str, Stack] = MappingProxyType({stack.name: stack for stack in (_GRAPHS, _EAGER, _PAPER)})


def device_named(name: str) -> Device:
    """A row of the table; InvalidRequestError lists the others."""
    if name not in DEVICES:
        raise InvalidRequestError("gpu", name, ", ".join(DEVICES))
    return DEVICES[name]


SERVICE = "service"


def service_stacks(name: str) -> tuple[Stack, Stack]:
    """Of a role on one rank, and of one on several: `service` has graphs on one alone.

    InvalidRequestError lists the names.
    """
    if name == SERVICE:
        return STACKS["graphs"], STACKS["eager"]
    if name not in STACKS:
        raise InvalidRequestError("stack", name, ", ".join([SERVICE, *STACKS]))
    return STACKS[name], STACKS[name]
