"""What is installed from a wheel works outside a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import CHECKOUT
from tests.fakes.checkpoints import write_checkpoint

PACKAGES = ("easyspec", "drafter_service", "verifier_service", "gateway")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs, without its dependencies."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for package in (*PACKAGES, "bench", "models"):
        shutil.copytree(CHECKOUT / package, source / package, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(CHECKOUT / "pyproject.toml", source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(source), str(source)]
    subprocess.run(wheel, check=True)
    (built,) = source.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), str(built)], check=True)
    return folder


def easyspec(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "easyspec.cli.main", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_brings_the_services_and_nothing_of_a_common_name(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if (path / "__init__.py").is_file()} == set(PACKAGES)
    assert (installed / "gateway" / "rest" / "static").is_dir()


def test_a_model_has_to_be_named(installed: Path, tmp_path: Path) -> None:
    ended = easyspec(installed, tmp_path, "up")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "no model is named, and the bundled ones are not here" in ended.stderr


def test_a_model_of_ones_own_is_served(installed: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny", num_hidden_layers=2, has_tokenizer=True)
    ended = easyspec(installed, tmp_path, "generate", str(folder), "def f(n):", "--max-tokens", "5", "--ignore-eos")
    assert ended.returncode == 0, ended.stderr
    assert "in, 5 out" in ended.stderr
    assert "guesses come from the text itself" in ended.stderr
