"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.recipe.settings import OptimSettings

# The quintic of Newton-Schulz orthogonalisation (Jordan et al., Muon): steepest at zero.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5
_RMS_OF_ADAMW = 0.2


class BatchedMuon(torch.optim.Optimizer):
    """Muon in float32 over stacks of equally shaped matrices.

    `torch.optim.Muon` orthogonalises matrix by matrix in bfloat16; on a CPU without bfloat16
    instructions that took 7.7 s a step for the base, stacks of float32 take 0.25 s. Updates have
    the root mean square of AdamW's, so its learning rates carry over. Nesterov momentum.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all matrices from their gradients; `closure` is not supported."""
        for group in self.param_groups:
            stacks: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    stacks[param.shape].append(param)
            for shape, params in stacks.items():
                updates = orthogonalise(torch.stack([self._nesterov(p, group) for p in params]))
                scale = group["lr"] * _RMS_OF_ADAMW * max(shape) ** 0.5
                for param, update in zip(params, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(update, alpha=-scale)

    def _nesterov(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(param.grad, 1 - group["momentum"])
        return param.grad.lerp(momentum, group["momentum"])


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return matrices [N, R, C] with all singular values near one, same singular vectors."""
    linear, cubic, quintic = _QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT  # [N, R, R]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x.mT if tall else x


def optimizers_for(model: nn.Module, settings: OptimSettings) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for everything else (tied weights once)."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    return [
        BatchedMuon(matrices, settings.matrix_lr, settings.weight_decay),
        torch.optim.AdamW(others, settings.vector_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule_progress(step: int, seconds: float, settings: OptimSettings) -> float:
    """Return how much of the run is over before this step, 1 or more at its end: the share of
    its steps or of its time, whichever is larger."""
    share_of_time = 0.0 if settings.max_seconds is None else seconds / settings.max_seconds
    return max(step / settings.num_steps, share_of_time)


def lr_factor(step: int, progress: float, settings: OptimSettings) -> float:
    """Return the factor on both learning rates: up by steps, down by progress in [0, 1)."""
    warmup = (step + 1) / settings.num_warmup_steps
    return min(1.0, warmup, (1 - progress) / settings.decay_share)


def set_lr_factor(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's learning rate relative to the one it was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * factor
