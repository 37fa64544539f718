"""What a running verifier takes of memory beside its weights and its keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.chaos.limits import footprint
from easyspec.checkpoint.location import weight_bytes
from easyspec.errors import UnavailableError
from easyspec.model.config import load_config
from easyspec.ops.kv_pool import KVPool

_MIB = 2**20


@dataclass(frozen=True)
class VerifierMemory:
    """MiB: the process' own resident memory (pages of mapped files, which are shared, left out), the size of its
    weights' files, and the keys and values of the most tokens it has held."""

    resident_mib: float
    weights_mib: float
    kv_mib: float

    @property
    def rest_mib(self) -> float:
        """What is beside weights, keys and values: the interpreter, libraries, buffers."""
        return self.resident_mib - self.weights_mib - self.kv_mib

    def __str__(self) -> str:
        return (
            f"memory of the verifier: {self.resident_mib:.0f} MiB of its own, {self.rest_mib:.0f} more than weights "
            f"({self.weights_mib:.0f} MiB) and KV ({self.kv_mib:.0f} MiB)"
        )


def verifier_memory(pid: int, model: Path, num_kv_tokens: int) -> VerifierMemory:
    """Of a process that serves `model` and has used so many slots of its pool; UnavailableError if it has gone."""
    found = footprint(pid)
    if found is None:
        raise UnavailableError("the verifier has ended")
    config = load_config(model)
    slot_bytes = KVPool.slot_bytes(config.num_layers, config.num_kv_heads, config.head_dim, config.dtype)
    return VerifierMemory(found.memory_mib, weight_bytes(model) / _MIB, num_kv_tokens * slot_bytes / _MIB)
