from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from easyspec.checkpoint.location import TOKENIZER_PATTERNS, model_path
from easyspec.errors import ConfigurationError


def test_a_folder_and_a_gguf_file_stand_for_themselves(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.touch()
    assert model_path(str(file)) == file
    assert model_path(str(tmp_path)) == file  # it is all there is
    (tmp_path / "config.json").touch()
    assert model_path(str(tmp_path)) == tmp_path


def test_of_several_gguf_files_one_must_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigurationError, match=r"name one of: a\.gguf, b\.gguf"):
        model_path(str(tmp_path))


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ConfigurationError, match=r"a file; allowed: a checkpoint folder, a \.gguf file or a hub id"):
        model_path(str(tmp_path / "model.bin"))


def test_a_hub_id_is_fetched_with_its_templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(model: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        names = ("model-1.safetensors", "consolidated.safetensors", "original/params.json", "onnx/model.safetensors")
        kept = [name for name in names if not any(fnmatch(name, pattern) for pattern in ignore_patterns)]
        assert kept == ["model-1.safetensors"]
        return f"{tmp_path}/{model}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "owner" / "name" / "config.json").touch()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda model, file: f"{tmp_path}/{model}/{file}")
    assert model_path("owner/name") == tmp_path / "owner/name"
    assert model_path("owner/name", TOKENIZER_PATTERNS) == tmp_path / "owner/name"
    assert model_path("owner/name/q4/tiny.gguf") == tmp_path / "owner/name/q4/tiny.gguf"
    assert all("*.jinja" in patterns for patterns in asked)
    assert ["*.safetensors" in patterns for patterns in asked] == [True, False]


def test_of_a_hub_id_with_gguf_files_one_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda model, **_: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda model: ["README.md", "tiny-Q4.gguf", "tiny-Q8.gguf"])
    with pytest.raises(ConfigurationError, match=r"name one: owner/name/tiny-Q4\.gguf, owner/name/tiny-Q8\.gguf"):
        model_path("owner/name")


def test_a_name_that_is_nothing_says_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"neither a folder, nor a \.gguf file, nor a hub id") as caught:
        model_path(f"{tmp_path}/no/such/folder")
    assert f"{tmp_path}/no/such/folder" in str(caught.value)
