"""How many token slots the KV pool gets."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from easyspec.errors import ConfigurationError
from easyspec.model.config import ModelConfig
from easyspec.ops.kv_pool import KVPool

_CPU_FRACTION = 0.2
_GPU_FRACTION = 0.85
_MOST_CPU_SLOTS = 32_768
_MOST_CPU_CONTEXTS = 4
_CGROUP = Path("/sys/fs/cgroup")


def num_pool_slots(
    config: ModelConfig,
    device: torch.device,
    num_slots: int | None,
    fraction: float | None,
    gib: float | None = None,
    step_bytes: int = 0,
) -> int:
    """`num_slots` if set, else what `gib` hold, else what `fraction` of the device's free memory does.

    `step_bytes`, what a step takes at most, stay free; raises ConfigurationError where they would not.
    """
    slot_bytes = KVPool.slot_bytes(config.num_layers, config.num_kv_heads, config.head_dim, config.dtype)
    if num_slots is None and gib is not None:
        num_slots = int(gib * 2**30) // slot_bytes
    left = free_bytes(device) - step_bytes
    if num_slots is not None:
        if num_slots * slot_bytes > left:
            wanted, most, step = (size >> 20 for size in (num_slots * slot_bytes, max(0, left), step_bytes))
            raise ConfigurationError(
                f"KV memory is {wanted} MiB; allowed: at most {most} MiB, which are free beside {step} MiB for a step "
                "(less with a smaller max_batch_rows)"
            )
        return num_slots
    is_cpu = device.type == "cpu"
    share = (_CPU_FRACTION if is_cpu else _GPU_FRACTION) if fraction is None else fraction
    fitting = int(share * max(0, left)) // slot_bytes
    return min(fitting, max(_MOST_CPU_SLOTS, _MOST_CPU_CONTEXTS * config.max_model_len)) if is_cpu else fitting


def context_within(num_slots: int, max_tree_nodes: int, config: ModelConfig, asked: int | None) -> int:
    """The longest text that fits a pool alone, with a tree behind it: no session that is let in can be too large.

    Raises ConfigurationError where not a prompt token and an output token fit, or not what was asked for.
    """
    longest = min(config.max_model_len, num_slots - max_tree_nodes)
    if longest < 2:
        least = max_tree_nodes + 2
        raise ConfigurationError(f"num_kv_slots is {num_slots}; allowed: at least {least}, for two tokens and a tree")
    if asked is not None and asked > longest:
        least = asked + max_tree_nodes
        raise ConfigurationError(f"num_kv_slots is {num_slots}; allowed: at least {least}, for max_model_len {asked}")
    return longest


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now: of the GPU, or of the machine and the container that this process is in."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free: int = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _lines(_CGROUP / "memory.max"), _lines(_CGROUP / "memory.current")
    if limit and used and limit[0].isdecimal():
        free = min(free, max(0, int(limit[0]) - int(used[0])))
    return free


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []
