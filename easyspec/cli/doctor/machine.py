"""Checks of the machine: Python, packages, processor, executor, memory, GPU, containers.

Imports no package it checks.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from easyspec.cli.doctor.report import Finding, ok, problem, warning
from easyspec.ops.native_library import best_path, library_problem, widens_bfloat16

_INSTALL = "run `make install`, or `pip install -c constraints.txt -e .` in the checkout"
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
_COMMAND_TIMEOUT_S = 5.0


def check_python() -> Finding:
    version, required = platform.python_version(), ">=3.11"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        required = importlib.metadata.metadata("easyspec")["Requires-Python"]
    if Version(version) not in SpecifierSet(required):
        return problem("python", f"{version}; needed: {required}", f"make a new environment with Python {required}")
    return ok("python", f"{version} ({sys.executable})")


def check_packages(requirements: Sequence[str] | None = None) -> list[Finding]:
    """Every dependency: there, and recent enough. One line for all that fit, one for each that does not."""
    if requirements is None:
        try:
            requirements = importlib.metadata.requires("easyspec") or []
        except importlib.metadata.PackageNotFoundError:
            return [warning("packages", "easyspec is not installed as a package: versions not checked", _INSTALL)]
    findings, num_fitting = [], 0
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        state = "missing"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            state = importlib.metadata.version(requirement.name)
        if state != "missing" and requirement.specifier.contains(state, prereleases=True):
            num_fitting += 1
        else:
            findings.append(problem("packages", f"{requirement.name} is {state}; needed: {requirement}", _INSTALL))
    if num_fitting:
        findings.append(ok("packages", f"{num_fitting} fit"))
    return findings


def check_cpu(cpuinfo: Path = Path("/proc/cpuinfo"), cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> Finding:
    """Cores this process may use, the instructions that matter, and a container's quota."""
    content = _read(cpuinfo)
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", content, re.MULTILINE)
    has = set(found.group(1).split()) if found else set()
    name = re.search(r"^model name\s*:\s*(.*)$", content, re.MULTILINE)
    num_cores = len(os.sched_getaffinity(0))
    features = ", ".join(feature for feature in _CPU_FEATURES if feature in has) or "no vector instructions known"
    message = f"{num_cores} cores, {name.group(1).strip() if name else platform.machine()}, {features}"
    quota = re.match(r"(\d+) (\d+)", _read(cpu_max))
    num_allowed = int(quota.group(1)) / int(quota.group(2)) if quota else num_cores
    if num_allowed < num_cores - 0.5:
        advice = f"give each service --num-threads {max(1, int(num_allowed))}, or threads will be stalled by the quota"
        return warning("cpu", f"{message}; a quota of {num_allowed:g} cores", advice)
    if platform.machine() == "x86_64" and has and "avx2" not in has:
        return warning("cpu", message, "models will be slow without AVX2: use another machine, or a GPU")
    return ok("cpu", message)


def check_executor() -> Finding:
    """Whether models can be computed by the native library, and by which instructions."""
    if (reason := library_problem()) is not None:
        advice = "install a C++20 compiler (g++ 11, clang 14 or newer) and easyspec again, or a wheel made elsewhere"
        return warning("executor", f"reference, several times slower than native: {reason}", advice)
    try:
        path = best_path().name.lower()
        widens = "; bfloat16 models are multiplied in float32" if widens_bfloat16(f"native-{path}") else ""
        return ok("executor", f"native, by {path} instructions{widens}")
    except ValueError as error:
        return problem("executor", str(error), "unset the variable, or name a code path of this processor")


def check_memory(
    num_weight_bytes: int,
    meminfo: Path = Path("/proc/meminfo"),
    memory_max: Path = Path("/sys/fs/cgroup/memory.max"),
    memory_used: Path = Path("/sys/fs/cgroup/memory.current"),
) -> Finding:
    """What is free, against the weights of the checkpoints given."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read(meminfo), re.MULTILINE)
    if found is None:
        return warning("memory", "free memory cannot be told here", "make sure the weights fit twice")
    num_free = int(found.group(1)) * 1024
    limit = _read(memory_max).strip()
    if limit.isdecimal():
        num_free = min(num_free, int(limit) - int(_read(memory_used).strip() or 0))
    message = f"{_size(num_free)} free, weights {_size(num_weight_bytes)}"
    if num_free < num_weight_bytes:
        return problem("memory", message, "use a smaller model, free memory, or a GPU that holds the weights")
    # Weights are laid out anew for the kernels while the file's pages are still mapped.
    if num_free < 2 * num_weight_bytes + 2**30:
        return warning("memory", message, "loading may need twice the weights for a moment: free some memory")
    return ok("memory", message)


def check_gpu(torch_version_file: Path | None = None) -> Finding:
    """NVIDIA GPUs, and whether the installed torch can use them, by its source: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if torch_version_file is None and spec is not None and spec.origin is not None:
        torch_version_file = Path(spec.origin).with_name("version.py")
    source = "" if torch_version_file is None else _read(torch_version_file)
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", source, re.MULTILINE)
    built = f"torch is built for CUDA {found.group(1)}" if found else ""
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    if listed is None:
        return ok("gpu", f"none found{built and f' ({built})'}; models run on the CPU")
    gpus = "; ".join(line.strip() for line in listed.splitlines() if line.strip())
    if not built:
        advice = "install a CUDA build: pip install torch --index-url https://download.pytorch.org/whl/cu128"
        return warning("gpu", f"{gpus}; the installed torch is a CPU build", advice)
    return ok("gpu", f"{gpus}; {built}")


def check_containers() -> Finding:
    """An engine and its compose command, for docker-compose.yml; nothing else needs them."""
    for engine in ("docker", "podman"):
        if shutil.which(engine) is None:
            continue
        version = _output(engine, "version", "--format", "{{.Client.Version}}")
        if _output(engine, "info") is None:
            return warning("containers", f"{engine} is there and does not answer", f"start it, and see `{engine} info`")
        if _output(engine, "compose", "version") is None:
            return warning("containers", f"{engine} without compose", f"install the compose plugin of {engine}")
        return ok("containers", f"{engine} {(version or '').strip()} with compose")
    return warning("containers", "neither docker nor podman", "install one to use docker-compose.yml; `up` needs none")


def machine_findings(num_weight_bytes: int) -> Iterator[Finding]:
    yield check_python()
    yield from check_packages()
    yield check_cpu()
    yield check_executor()
    yield check_memory(num_weight_bytes)
    yield check_gpu()
    yield check_containers()


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there, fails or takes too long."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=True).stdout
    return None


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
