"""With which weights a result was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from bench.harness import provenance as module
from bench.harness.benchmark import Benchmark, Findings
from bench.harness.provenance import provenance, provenance_lines, weights_digest


@dataclass(frozen=True)
class NoSettings:
    """Nothing to set."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(module, "REPOSITORY", tmp_path.parent)
    monkeypatch.setattr(module, "BUNDLED", (tmp_path,))
    return tmp_path


def test_the_digest_is_of_the_weights_alone(folder: Path) -> None:
    digest = weights_digest(folder)
    (folder / "README.md").write_text("a card", encoding="utf-8")
    weights_digest.cache_clear()
    assert weights_digest(folder) == digest
    (folder / "model.safetensors").write_bytes(b"others")
    weights_digest.cache_clear()
    assert weights_digest(folder) != digest


def test_figures_of_earlier_weights_say_so(folder: Path) -> None:
    report = {"command": "measure", **provenance([folder], "0123456789ab")}
    lines = provenance_lines(report)
    assert "* command: `measure`" in lines
    assert any(line.startswith("* commit 0123456789ab, ") for line in lines)
    assert f"* weights: {folder.name} {weights_digest(folder)}" in lines
    assert not any("trained further" in line for line in lines)
    assert not any("trained further" in line for line in provenance_lines({**report, "weights": {}}))
    weights_digest.cache_clear()
    (folder / "model.safetensors").write_bytes(b"trained further")
    assert any("trained further" in line for line in provenance_lines(report))


def test_the_commit_is_that_of_the_time_before_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a benchmark writes into the tree, a plot of its own, makes it no other tree."""
    commits = ["0123456789ab"]
    monkeypatch.setattr("bench.harness.benchmark.current_commit", lambda: commits[-1])

    def measure(settings: NoSettings, console: Console) -> Findings:
        commits.append("0123456789ab-dirty")
        return Findings({"answer": 42})

    path = tmp_path / "result.json"
    Benchmark("measure", "About.", NoSettings, measure).main(["--json", str(path)])
    assert json.loads(path.read_text())["commit"] == "0123456789ab"
