"""Which rows of the table the names are that torch gives to devices."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from easyspec.planner.gpus import Gpu, detect_gpus, known_device
from easyspec.planner.hardware import device_named

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_names_as_torch_gives_them(name: str, row: str) -> None:
    device = known_device([Gpu(name, 33 * GIB)] * 2)
    assert device is not None
    assert (device.name, device.memory_bytes) == (row, 33 * GIB)
    assert device.memory_bytes_per_s == device_named(row).memory_bytes_per_s
    assert device.link_bytes_per_s == device_named(row).link_bytes_per_s


@pytest.mark.parametrize(
    "name", ["NVIDIA GH200 480GB", "NVIDIA L40", "Abacus 9000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_what_is_not_in_the_table_is_not_guessed(name: str) -> None:
    assert known_device([Gpu("NVIDIA H200", 141 * GIB), Gpu(name, 96 * GIB)]) is None


def test_different_gpus_are_as_slow_as_the_slowest_and_as_small_as_the_smallest() -> None:
    device = known_device([Gpu("NVIDIA H200", 139 * GIB), Gpu("NVIDIA A100-PCIE-40GB", 40 * GIB)])
    assert device is not None
    assert device.memory_bytes == 40 * GIB
    assert device.memory_bytes_per_s == device_named("a100-40gb").memory_bytes_per_s
    assert device.link_bytes_per_s == device_named("a100-pcie").link_bytes_per_s


def test_torch_is_asked_only_where_there_is_a_device_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "a warning"\necho \'[["NVIDIA L4", 24], ["NVIDIA L4", 25]]\'\n')
    os.chmod(python, 0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert detect_gpus(tmp_path) == ()
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert detect_gpus(tmp_path) == (Gpu("NVIDIA L4", 24), Gpu("NVIDIA L4", 25))
    python.write_text("#!/bin/sh\nexit 1\n")
    assert detect_gpus(tmp_path) == ()
