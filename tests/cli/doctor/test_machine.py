from __future__ import annotations

import os
from pathlib import Path

import pytest

from easyspec.cli.doctor import machine
from easyspec.cli.doctor.machine import (
    check_containers,
    check_cpu,
    check_executor,
    check_gpu,
    check_memory,
    check_packages,
    check_python,
)
from easyspec.cli.doctor.report import State, ok
from easyspec.ops import native_library


def test_this_python_fits_and_an_old_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_python().state is State.OK
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    finding = check_python()
    assert finding.state is State.PROBLEM
    assert "3.9.1; needed: >=3.11" in finding.message
    assert finding.advice


def test_packages_one_line_for_all_that_fit_and_one_for_each_that_does_not() -> None:
    requirements = [
        "pytest>=1.0",
        "pytest>=999",
        "no-such-package-anywhere>=2",
        'no-such-extra>=1; extra == "dev"',
        'no-such-system>=1; sys_platform == "beos"',
    ]
    findings = check_packages(requirements)
    assert [finding.state for finding in findings] == [State.PROBLEM, State.PROBLEM, State.OK]
    assert "pytest is" in findings[0].message
    assert "needed: pytest>=999" in findings[0].message
    assert findings[1].message == "no-such-package-anywhere is missing; needed: no-such-package-anywhere>=2"
    assert all("pip install" in finding.advice for finding in findings[:2])
    assert findings[2].message == "1 fit"


def test_a_cpu_with_its_features_and_a_quota(tmp_path: Path) -> None:
    cpuinfo, quota = tmp_path / "cpuinfo", tmp_path / "cpu.max"
    cpuinfo.write_text("model name\t: Fast 9000\nflags\t\t: sse avx2 avx512f avx512_bf16\n")
    quota.write_text("max 100000\n")
    finding = check_cpu(cpuinfo, quota)
    assert finding.state is State.OK
    assert "Fast 9000, avx2, avx512f, avx512_bf16" in finding.message
    quota.write_text(f"{50_000 * len(os.sched_getaffinity(0)) // 2} 100000\n")
    finding = check_cpu(cpuinfo, quota)
    assert finding.state is State.WARNING
    assert "--num-threads" in finding.advice


def test_the_executor_is_native_where_the_library_was_built_and_else_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EASYSPEC_CODE_PATH", "portable")
    if native_library.library_problem() is None:
        assert check_executor() == ok(
            "executor", "native, by portable instructions; bfloat16 models are multiplied in float32"
        )
        monkeypatch.setenv("EASYSPEC_CODE_PATH", "mmx")
        assert check_executor().state is State.PROBLEM
    monkeypatch.setattr(native_library, "LIBRARY", tmp_path / "libeasyspec.so")
    native_library.load.cache_clear()
    finding = check_executor()
    native_library.load.cache_clear()
    assert finding.state is State.WARNING
    assert "C++ compiler" in finding.message
    assert "C++20 compiler" in finding.advice


def test_a_library_of_other_sources_is_a_warning_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    (libc,) = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc." in line][:1]
    monkeypatch.setattr(native_library, "LIBRARY", Path(libc))
    native_library.load.cache_clear()
    finding = check_executor()
    native_library.load.cache_clear()
    assert finding.state is State.WARNING
    assert "built from other sources, install easyspec again" in finding.message


def test_a_cpu_without_vector_instructions_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : Old\nflags : sse sse2\n")
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    assert check_cpu(cpuinfo, tmp_path / "none").state is State.WARNING


@pytest.mark.parametrize(
    ("weights_gib", "state"), [(1, State.OK), (4, State.WARNING), (7, State.PROBLEM)], ids=lambda value: str(value)
)
def test_memory_against_the_weights(tmp_path: Path, weights_gib: int, state: State) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 9 kB\nMemAvailable:   {6 * 2**20} kB\n")
    none = tmp_path / "none"
    finding = check_memory(weights_gib * 2**30, meminfo, none, none)
    assert finding.state is state
    assert "6.0 GiB free" in finding.message


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    meminfo, limit, used = tmp_path / "meminfo", tmp_path / "max", tmp_path / "current"
    meminfo.write_text(f"MemAvailable: {60 * 2**20} kB\n")
    limit.write_text(f"{2 * 2**30}\n")
    used.write_text(f"{2**30}\n")
    finding = check_memory(2**31, meminfo, limit, used)
    assert finding.state is State.PROBLEM
    assert "1.0 GiB free" in finding.message


def command(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("torch_source", "state", "words"),
    [
        ("cuda: Optional[str] = None\n", State.WARNING, "CPU build"),
        ("cuda: Optional[str] = '12.8'\n", State.OK, "built for CUDA 12.8"),
    ],
)
def test_a_gpu_needs_a_torch_that_can_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_source: str, state: State, words: str
) -> None:
    command(tmp_path, "nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 570.86'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    version_file = tmp_path / "version.py"
    version_file.write_text(torch_source)
    finding = check_gpu(version_file)
    assert finding.state is state
    assert "H100" in finding.message
    assert words in finding.message


def test_no_gpu_is_no_complaint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_gpu().state is State.OK


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        ("exit 0", State.OK, "with compose"),
        ('[ "$1" != compose ]', State.WARNING, "without compose"),
        ('[ "$1" != info ]', State.WARNING, "does not answer"),
    ],
)
def test_container_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, state: State, words: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "neither docker nor podman" in check_containers().message
    command(tmp_path, "podman", script)
    finding = check_containers()
    assert finding.state is state
    assert words in finding.message
