"""The cost model: how long a pass takes, from bytes, operations, launches and collectives.

A pass is a chain of parts. Each part takes what bounds it: the bytes it reads, the operations it computes, the
least its kernels take on the device, or the host that launches them:

    part = max(bytes / bandwidth + kernels x floor, operations / rate, kernels x launch)

and a collective takes its latency plus its bytes over the links. Times are microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from easyspec.parallel.layer_groups import LayerPlan
from easyspec.planner.hardware import Device, Stack
from easyspec.planner.shape import ModelShape
from easyspec.speculation.parameters import MlpPlacement


@dataclass(frozen=True)
class Load:
    """What a pass computes: token rows, and cached tokens that each of them sees."""

    num_rows: int
    context_tokens: int


@dataclass(frozen=True)
class CostModel:
    """Times on one kind of device under one stack, or another where several ranks run a model (None: the same)."""

    device: Device
    stack: Stack
    stack_of_ranks: Stack | None = None

    def of_role(self, num_ranks: int) -> CostModel:
        """The model for a role that runs on that many ranks."""
        return self if num_ranks == 1 or self.stack_of_ranks is None else replace(self, stack=self.stack_of_ranks)

    def _part_us(self, num_kernels: float, num_bytes: float, num_flops: float) -> float:
        bandwidth = self.device.memory_bytes_per_s * self.stack.memory_efficiency
        rate = self.device.flops_per_s * self.stack.compute_efficiency
        device_us = 1e6 * max(num_bytes / bandwidth, num_flops / rate) + num_kernels * self.stack.kernel_floor_us
        return max(device_us, num_kernels * self.stack.launch_us)

    def attention_us(self, shape: ModelShape, load: Load, num_layers: float = 1, num_ranks: int = 1) -> float:
        """Attention of layers that run as one step, its weights and heads split over ranks."""
        kv_ranks = min(num_ranks, shape.num_kv_heads)
        weights = num_layers * shape.attention_parameters / num_ranks
        cached = num_layers * shape.kv_bytes(load.context_tokens) / kv_ranks
        scores = num_layers * 4 * shape.num_heads * shape.head_dim * load.context_tokens * load.num_rows / num_ranks
        num_bytes = shape.bytes_per_value * weights + cached
        return self._part_us(self.stack.attention_kernels, num_bytes, 2 * weights * load.num_rows + scores)

    def mlp_us(self, shape: ModelShape, load: Load, num_layers: float = 1, num_ranks: int = 1) -> float:
        """MLPs of layers that run as one step, split over ranks."""
        weights = num_layers * shape.mlp_parameters / num_ranks
        return self._part_us(self.stack.mlp_kernels, shape.bytes_per_value * weights, 2 * weights * load.num_rows)

    def head_us(self, shape: ModelShape, load: Load, num_ranks: int = 1) -> float:
        """Final norm and output head."""
        weights = shape.head_parameters / num_ranks
        return self._part_us(2, shape.bytes_per_value * weights, 2 * weights * load.num_rows)

    def all_reduce_us(self, num_bytes: float, num_ranks: int) -> float:
        """Sum over ranks, which is an all-gather and a sum on each (docs/decisions/0015); nothing on one rank."""
        return self.all_gather_us(num_ranks * num_bytes, num_ranks)

    def all_gather_us(self, num_bytes: float, num_ranks: int) -> float:
        """Every rank's part to every rank, `num_bytes` in all; 0 on one rank."""
        if num_ranks == 1:
            return 0.0
        sent = (num_ranks - 1) / num_ranks * num_bytes
        return self.stack.collective_us + 1e6 * sent / self.device.link_bytes_per_s

    def order_us(self, num_ranks: int) -> float:
        """What rank 0 says before a pass; nothing on one rank."""
        stack = self.stack
        return 0.0 if num_ranks == 1 else stack.collective_us if stack.order_us is None else stack.order_us

    def tensor_parallel_us(self, shape: ModelShape, load: Load, num_ranks: int) -> float:
        """A pass whose every layer is split over ranks: two sums a layer. One rank: an ordinary pass."""
        hidden_bytes = shape.bytes_per_value * load.num_rows * shape.hidden_size
        layer_us = self.attention_us(shape, load, 1, num_ranks) + self.mlp_us(shape, load, 1, num_ranks)
        layer_us += 2 * self.all_reduce_us(hidden_bytes, num_ranks)
        logits_bytes = 4 * load.num_rows * shape.vocab_size
        total_us = shape.num_layers * layer_us + self.head_us(shape, load, num_ranks)
        return total_us + self.all_gather_us(logits_bytes, num_ranks) + self.order_us(num_ranks)

    def layer_parallel_us(
        self, shape: ModelShape, load: Load, plan: LayerPlan, num_ranks: int, *, is_mlp_sharded: bool = False
    ) -> float:
        """A fuzzy pass by `plan` over ranks that own whole layers of each group.

        Sequential MLPs are computed by every rank alike, or split over all of them (one all-reduce each). Staged MLPs
        run where their layer lives: a group takes two collectives whatever its size.
        """
        hidden_bytes = shape.bytes_per_value * load.num_rows * shape.hidden_size
        total_us = self.head_us(shape, load) + self.order_us(num_ranks)
        for group in plan.groups:
            size = len(group)
            ranks = min(num_ranks, size)
            most_layers = -(-size // ranks)  # on the busiest rank
            total_us += self.attention_us(shape, load, most_layers)
            total_us += self.all_gather_us(size * hidden_bytes, ranks)
            if plan.mlp is MlpPlacement.STAGED and size > 1:
                total_us += self.mlp_us(shape, load, most_layers) + self.all_reduce_us(hidden_bytes, ranks)
            elif is_mlp_sharded:
                total_us += size * (
                    self.mlp_us(shape, load, 1, num_ranks) + self.all_reduce_us(hidden_bytes, num_ranks)
                )
            else:
                total_us += size * self.mlp_us(shape, load)
        return total_us
