"""Between host and device: values go over without making the host wait, and looking at results does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor of (nested) `values`."""
    return moved(torch.tensor(values, dtype=dtype), device)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; from pinned memory, because a copy from other memory makes the host wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def is_remote(tensor: Tensor) -> bool:
    """Whether looking at a value makes the host wait for a device, which it should do once a round."""
    return tensor.device.type != "cpu"
