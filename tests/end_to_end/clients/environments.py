"""Virtual environments for clients whose packages need more than a folder."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

# On a busy machine the larger packages take many minutes.
INSTALL_TIMEOUT_S = 3000


def fetched(*command: str, folder: Path | None = None) -> None:
    """Run a command that installs a package. Where it cannot be had the test is skipped, in the installer's words."""
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    if ended.returncode != 0:
        pytest.skip(f"`{' '.join(command)}` failed: {ended.stderr[-600:]}")


@dataclass(frozen=True)
class Environment:
    """A virtual environment with one client in it."""

    folder: Path

    def run(self, *command: str, timeout_s: float = 900, **variables: str) -> str:
        """What a command of this environment prints; `python` is its own."""
        program = str(self.folder / "bin" / command[0])
        # Libraries that compute would each take all cores.
        surroundings = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        ended = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, env=surroundings, timeout=timeout_s, check=False
        )
        assert ended.returncode == 0, (ended.stdout[-2000:], ended.stderr[-4000:])
        return ended.stdout


def installed(folder: Path, package: str, *, sees_ours: bool = False) -> Environment:
    """An environment with `package`; `sees_ours`: what is installed here and fits is used, torch above all."""
    venv.create(folder, with_pip=True, symlinks=True)
    environment = Environment(folder)
    if sees_ours:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    fetched(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile", package)
    return environment
