"""Where and on what a measurement was made."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from easyspec.ops.executor import choose_executor

REPOSITORY = Path(__file__).resolve().parents[2]


def describe_machine() -> dict[str, str | int]:
    """What a reader needs to compare two measurements. `cores` are those this process may use, `executor` is the
    fastest that runs here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "executor": choose_executor("auto", torch.device("cpu"), num_threads=1).name,
    }


def current_commit() -> str:
    """The commit of this checkout, `-dirty` appended if tracked files differ, or "unknown" outside one."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
