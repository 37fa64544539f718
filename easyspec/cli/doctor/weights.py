"""Whether the safetensors files of a checkpoint hold its model, read from their headers alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from easyspec.checkpoint.location import weight_bytes
from easyspec.cli.doctor.report import Finding, ok, problem

_LOOKING_S = 300.0


def check_weights(name: str, folder: Path) -> Finding:
    """Every file is there and whole, and together they hold the model of config.json."""
    if (why := layout_problem(folder)) is not None:
        return problem(f"{name} weights", why, "get the whole checkpoint again, with its own config.json")
    num_files, size = len([*folder.glob("*.safetensors")]), weight_bytes(folder) / 2**20
    return ok(f"{name} weights", f"{num_files} file(s), {size:,.0f} MiB, all whole")


def layout_problem(folder: Path) -> str | None:
    """What the loader has against the files' headers, None if nothing.

    It looks in a process of its own: the other checks must work where torch does not.
    """
    command = [sys.executable, "-m", "easyspec.model.layout", str(folder)]
    try:
        looked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LOOKING_S)
    except subprocess.TimeoutExpired:
        return f"the headers could not be read within {_LOOKING_S:g} s"
    if looked.returncode == 0:
        return None
    last_line = (looked.stdout or looked.stderr).strip().rpartition("\n")[2]
    return last_line or f"looking at it ended with exit code {looked.returncode}"
