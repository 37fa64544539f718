"""Ranks: processes that compute one model together, and what they say to each other.

Rank 0 speaks to the outside and decides; the others follow. Sums are formed in the order of the ranks, whatever the
backend's own algorithm: a ring adds a row's parts in an order that depends on where the row stands in the buffer, and
then a token's bits would depend on its neighbours in the batch (docs/decisions/0015).

Dimensions: `R` ranks.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from easyspec.errors import ConfigurationError, EngineLostError
from easyspec.parallel.launch import group_size
from easyspec.parallel.meeting import meet

# A follower that misses several heartbeats of rank 0 gives up; longer than any single pass takes.
DEFAULT_TIMEOUT_S = 300.0
_HEADER_BYTES = 8
# What a step's metadata needs most of the time: one broadcast carries it all.
_INLINE_BYTES = 32 * 1024


# Renamed in torch 2.13.
_gather_into: Callable[[torch.Tensor, torch.Tensor], object] = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)


class Ranks(Protocol):
    """This process's place among the processes that compute a model together."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' parts added in rank order, in float32, rounded once to the part's type; one collective."""

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """All ranks' parts [R, *part.shape], on every rank; one collective."""

    def share(self, payload: bytes | None) -> bytes:
        """Rank 0's `payload` on every rank; the others pass None. One collective unless the payload is large."""


@dataclass(frozen=True)
class SingleRank:
    """A process alone: every collective is free."""

    rank: int = 0
    size: int = 1

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return part.unsqueeze(0)

    def share(self, payload: bytes | None) -> bytes:
        assert payload is not None, "rank 0 has something to say"
        return payload


SINGLE_RANK = SingleRank()


class GroupRanks:
    """Ranks of a torch.distributed process group. Raises EngineLostError when the others cannot be reached.

    `num_collectives` counts what was called, by name, and `num_bytes` what this rank put into sums and gathers, for
    tests and plans. Not thread-safe: the device thread owns it.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.num_collectives: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self._device = device

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        parts = self._all_gather("sum", part)
        total = parts[0].float()
        for other in parts[1:]:
            total = total + other
        return total.to(part.dtype)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return self._all_gather("gather", part)

    def share(self, payload: bytes | None) -> bytes:
        self.num_collectives["share"] += 1
        message = torch.zeros(_HEADER_BYTES + _INLINE_BYTES, dtype=torch.uint8)
        if payload is not None:
            inline = payload[:_INLINE_BYTES]
            head = len(payload).to_bytes(_HEADER_BYTES, "little") + inline
            message[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        message = self._broadcast(message)
        raw = message.numpy().tobytes()
        num_bytes = int.from_bytes(raw[:_HEADER_BYTES], "little")
        inline = raw[_HEADER_BYTES : _HEADER_BYTES + min(num_bytes, _INLINE_BYTES)]
        if num_bytes <= _INLINE_BYTES:
            return inline
        self.num_collectives["share"] += 1
        rest = torch.zeros(num_bytes - _INLINE_BYTES, dtype=torch.uint8)
        if payload is not None:
            rest = torch.frombuffer(bytearray(payload[_INLINE_BYTES:]), dtype=torch.uint8)
        return inline + self._broadcast(rest).numpy().tobytes()

    def _all_gather(self, name: str, part: torch.Tensor) -> torch.Tensor:
        self.num_collectives[name] += 1
        self.num_bytes[name] += part.nbytes
        part = part.contiguous()
        parts = part.new_empty(self.size, *part.shape)
        try:
            _gather_into(parts.view(-1), part.view(-1))
        except RuntimeError as error:
            raise EngineLostError(f"rank {self.rank}: a collective failed: {error}") from error
        return parts

    def _broadcast(self, message: torch.Tensor) -> torch.Tensor:
        on_device = message.to(self._device)
        try:
            dist.broadcast(on_device, src=0)
        except RuntimeError as error:
            raise EngineLostError(f"rank {self.rank}: a collective failed: {error}") from error
        return on_device.cpu()


def join_group(device: torch.device, timeout_s: float = DEFAULT_TIMEOUT_S) -> Ranks:
    """The ranks that torchrun started, or SINGLE_RANK; NCCL on GPUs, gloo elsewhere. Raises ConfigurationError."""
    if group_size() == 1:
        return SINGLE_RANK
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            store, rank, size = meet(timeout_s)
            timeout = datetime.timedelta(seconds=timeout_s)
            dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
        except (RuntimeError, ValueError) as error:
            raise ConfigurationError(f"the ranks cannot meet: {error}") from error
    return GroupRanks(device)


def leave_group() -> None:
    """Leave the process group, if there is one; idempotent."""
    if dist.is_initialized():
        dist.destroy_process_group()
