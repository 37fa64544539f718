"""The GPUs of this machine, and which row of the planner's table they are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from easyspec.planner.hardware import DEVICES, Device

# Without one of these torch, which takes seconds to load, need not be asked: NVIDIA, WSL, AMD.
_SIGNS = ("dev/nvidia[0-9]*", "dev/dxg", "dev/kfd")
_ASK_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[gpu.name, gpu.total_memory] for gpu in gpus]))
"""
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Gpu:
    """One device as torch names it."""

    name: str
    memory_bytes: int


def detect_gpus(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """The devices that services started from here will see, in their order; none if torch cannot use any.

    torch is asked in a process of its own: the answer respects CUDA_VISIBLE_DEVICES, and no driver is opened here.
    """
    if not any(any(root.glob(sign)) for sign in _SIGNS):
        return ()
    try:
        asked = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(Gpu(name, memory_bytes) for name, memory_bytes in json.loads(asked.stdout.splitlines()[-1]))


def known_device(gpus: Sequence[Gpu]) -> Device | None:
    """What the cost model takes for each of `gpus`, with the memory of the smallest; None if it knows one of them not.

    Of different ones a group is as fast as the slowest: each figure is the least of theirs.
    """
    if not gpus or any(not _rows(gpu) for gpu in gpus):
        return None
    rows = [row for gpu in gpus for row in _rows(gpu)]
    names = {max(_rows(gpu), key=lambda row: len(row.name)).name for gpu in gpus}
    return Device(
        name=" and ".join(sorted(names)),
        memory_bytes=min(gpu.memory_bytes for gpu in gpus),
        memory_bytes_per_s=min(row.memory_bytes_per_s for row in rows),
        flops_per_s=min(row.flops_per_s for row in rows),
        link_bytes_per_s=min(row.link_bytes_per_s for row in rows),
        source="; ".join(dict.fromkeys(row.source for row in rows)),
    )


def _rows(gpu: Gpu) -> list[Device]:
    """Rows whose name is part of the device's, word for word: an L4 is no L40S, an H200 no GH200.

    Of `A100-PCIE-40GB` there are three, whose least figures together are its own. A slice of a device is not known.
    """
    words = set(re.findall(r"[a-z0-9]+", gpu.name.lower()))
    if "mig" in words:
        return []
    return [row for row in DEVICES.values() if set(row.name.split("-")) <= words]
