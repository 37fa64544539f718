"""Limits put on a running process from outside, and what it has of the machine. Linux."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Footprint:
    """What a process has: resident memory that is its own (MiB, mapped files left out), descriptors and threads."""

    memory_mib: float
    num_descriptors: int
    num_threads: int


def footprint(pid: int) -> Footprint | None:
    """None if the process has gone."""
    folder = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        num_descriptors = len([*(folder / "fd").iterdir()])
        return Footprint(round(_kib(status["RssAnon"]) / 1024, 1), num_descriptors, int(status["Threads"]))
    except (OSError, KeyError):
        return None


@contextlib.contextmanager
def full_memory(pid: int, spare_bytes: int) -> Iterator[None]:
    """The process gets no more than `spare_bytes` of address space beyond what it has."""
    status = Path(f"/proc/{pid}/status").read_text()
    size_bytes = 1024 * next(_kib(line.split(":")[1]) for line in status.splitlines() if line.startswith("VmSize"))
    with _soft_limit(pid, resource.RLIMIT_AS, size_bytes + spare_bytes):
        yield


@contextlib.contextmanager
def full_disk(pid: int) -> Iterator[None]:
    """The process cannot write to files, its log among them."""
    with _soft_limit(pid, resource.RLIMIT_FSIZE, 0):
        yield


@contextlib.contextmanager
def _soft_limit(pid: int, kind: int, value: int) -> Iterator[None]:
    soft, hard = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (value, hard))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it may have ended of it
            resource.prlimit(pid, kind, (soft, hard))


def _kib(text: str) -> int:
    return int(text.split()[0])
