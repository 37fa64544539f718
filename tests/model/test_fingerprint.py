from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from easyspec.errors import ConfigurationError
from easyspec.model.config import load_config
from easyspec.model.fingerprint import model_fingerprint
from tests.fakes.checkpoints import write_checkpoint


def fingerprint_of(folder: Path, dtype: str = "auto", max_model_len: int | None = None) -> str:
    return model_fingerprint(folder, load_config(folder, dtype, max_model_len))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "one")


def test_a_copy_has_the_same_one_whatever_notes_it_carries(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "renamed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {"transformers_version": "9.9", "_name_or_path": "somewhere/else"}
    (copy / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert fingerprint_of(copy) == fingerprint_of(folder)


def test_other_weights_of_the_same_shape_differ(folder: Path, tmp_path: Path) -> None:
    assert fingerprint_of(write_checkpoint(tmp_path / "other", seed=5)) != fingerprint_of(folder)


def test_a_single_flipped_bit_in_a_small_file_is_seen(folder: Path) -> None:
    """Files up to 1 MiB are read whole."""
    before = fingerprint_of(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    assert len(content) < 256 * 4096
    content[-5] ^= 1
    weights.write_bytes(content)
    assert fingerprint_of(folder) != before


@pytest.mark.parametrize(("dtype", "max_model_len"), [("bfloat16", None), ("auto", 17)])
def test_how_it_is_run_counts(folder: Path, dtype: str, max_model_len: int | None) -> None:
    assert fingerprint_of(folder, dtype, max_model_len) != fingerprint_of(folder)


def test_the_architecture_counts(folder: Path) -> None:
    before = fingerprint_of(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert fingerprint_of(folder) != before


def test_a_missing_file_is_named(folder: Path) -> None:
    config = load_config(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"model\.safetensors"):
        model_fingerprint(folder, config)
