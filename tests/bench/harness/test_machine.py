from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.harness import machine


def test_the_commit_is_marked_when_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "First")
    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    assert git("rev-parse", "HEAD").startswith(machine.current_commit())
    (tmp_path / "file").write_text("two")
    assert machine.current_commit().endswith("-dirty")


def test_outside_a_checkout_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.current_commit() == "unknown"


def test_the_machine_names_its_cpu_and_versions() -> None:
    found = machine.describe_machine()
    assert found["cpu"]
    assert int(found["cores"]) >= 1
    assert int(found["memory_gib"]) >= 1
    assert str(found["torch"]).startswith("2.")
    assert str(found["executor"]).startswith(("native-", "reference"))
