"""Limits put on a running process from outside, and what it has of the machine. Linux."""

from __future__ import annotations

import contextlib
import os
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
    try:
        status, num_descriptors = process_status(pid), len(os.listdir(f"/proc/{pid}/fd"))
        return Footprint(round(status["RssAnon"] / 1024, 1), num_descriptors, status["Threads"])
    except (OSError, KeyError):
        return None


@contextlib.contextmanager
def full_memory(pid: int, spare_bytes: int) -> Iterator[None]:
    """The process gets no more than `spare_bytes` of address space beyond what it has."""
    with _soft_limit(pid, resource.RLIMIT_AS, 1024 * process_status(pid)["VmSize"] + spare_bytes):
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


def process_status(pid: int) -> dict[str, int]:
    """The numbers of /proc/PID/status by name; sizes are in KiB."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name.rstrip(":"): int(values[0]) for name, *values in lines if values and values[0].isdigit()}
