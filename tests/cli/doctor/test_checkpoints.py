from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from easyspec.cli.doctor import checkpoints
from easyspec.cli.doctor.checkpoints import checkpoint_findings
from easyspec.cli.doctor.report import Finding, State
from easyspec.errors import ConfigurationError
from easyspec.model.layout import check_layout
from easyspec.model.supported_models import SUPPORTED_MODEL_TYPES
from tests.fakes.checkpoints import change_config, write_checkpoint
from tests.fakes.families import FAMILY_OPTIONS


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("whole"), has_tokenizer=True)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("small"), num_hidden_layers=1, has_tokenizer=True)


@pytest.fixture
def broken(tmp_path: Path, whole: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(whole, tmp_path / "broken"))


@pytest.fixture(autouse=True)
def looks_here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Looks at layouts in this process, where torch is loaded already."""

    def problem_here(folder: Path) -> str | None:
        try:
            check_layout(folder)
        except ConfigurationError as error:
            return str(error)
        return None

    if request.node.name != "test_layouts_are_looked_at_in_a_process_of_their_own":
        monkeypatch.setattr(checkpoints, "layout_problem", problem_here)


def finding_of(check: str, base: Path, draft: Path | None = None) -> Finding:
    (found,) = [finding for finding in checkpoint_findings(base, draft) if finding.check == check]
    return found


def test_a_pair_that_fits(whole: Path, small: Path) -> None:
    findings = checkpoint_findings(whole, small)
    assert {finding.state for finding in findings} == {State.OK}, findings
    assert [finding.check for finding in findings] == [
        *("base config", "base weights", "base tokenizer", "draft config", "draft weights", "draft tokenizer"),
        *("pair tokenizer", "pair size"),
    ]


# These two wrap a text tower, whose small shape their own configuration would not take.
@pytest.mark.parametrize("model_type", sorted(set(SUPPORTED_MODEL_TYPES) - {"gemma3", "mistral3"}))
def test_every_supported_family_is_whole(tmp_path: Path, model_type: str) -> None:
    options = FAMILY_OPTIONS.get(model_type, {})
    folder = write_checkpoint(tmp_path / model_type, model_type, max_shard_size="60KB", has_tokenizer=True, **options)
    assert (folder / "model.safetensors.index.json").exists()
    assert finding_of("base weights", folder).state is State.OK


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "quip"}}, "quant_method is 'quip'"),
        ({"model_type": None}, "no usable config.json"),
    ],
)
def test_a_configuration_that_cannot_run(broken: Path, fields: dict[str, Any], words: str) -> None:
    change_config(broken, **fields)
    finding = finding_of("base config", broken)
    assert finding.state is State.PROBLEM
    assert words in finding.message
    assert finding.advice


def test_no_folder_at_all(tmp_path: Path) -> None:
    (finding,) = checkpoint_findings(tmp_path / "none", None)
    assert finding.state is State.PROBLEM
    assert "neither a folder" in finding.message


# --- weights ----------------------------------------------------------------------------------------------------


def weights_problem(folder: Path) -> Finding:
    finding = finding_of("base weights", folder)
    assert finding.state is State.PROBLEM
    assert finding.advice
    return finding


def test_a_download_that_was_cut(broken: Path) -> None:
    path = broken / "model.safetensors"
    num_bytes = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(num_bytes - 1)
    assert "file not fully covered" in weights_problem(broken).message


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_a_file_that_is_no_safetensors_file(broken: Path, content: bytes) -> None:
    (broken / "model.safetensors").write_bytes(content)
    assert "model.safetensors: Error while deserializing header" in weights_problem(broken).message


def test_a_git_lfs_pointer(broken: Path) -> None:
    (broken / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    message = weights_problem(broken).message
    assert "Git LFS pointer" in message
    assert "git lfs pull" in message


def test_pickled_weights_only(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    assert "pickled" in weights_problem(broken).message


def test_more_layers_than_tensors(broken: Path) -> None:
    change_config(broken, num_hidden_layers=5)
    message = weights_problem(broken).message
    assert "no tensor 'model.layers.3." in message


def test_layouts_are_looked_at_in_a_process_of_their_own(broken: Path) -> None:
    assert finding_of("base weights", broken).state is State.OK
    change_config(broken, num_hidden_layers=5)
    assert weights_problem(broken).message.startswith("no tensor 'model.layers.3.")


def test_a_shard_that_is_missing_or_lacks_what_the_index_promises(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, max_shard_size="60KB", has_tokenizer=True)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = min(content["weight_map"].values())
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {"ghost": first}}))
    assert f"{first} lacks 'ghost'" in weights_problem(folder).message
    index.write_text(json.dumps(content))
    (folder / first).unlink()
    assert f"missing checkpoint file {folder / first}" in weights_problem(folder).message
    index.write_text("{")
    assert f"corrupt {index}" in weights_problem(folder).message


# --- tokenizers -------------------------------------------------------------------------------------------------


def change_vocabulary(folder: Path, renamed: dict[str, str], merges_dropped: int = 0) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {renamed.get(token, token): token_id for token, token_id in vocabulary.items()}
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[: len(merges) - merges_dropped]
    path.write_text(json.dumps(content))


def test_vocabularies_that_differ_are_explained(broken: Path, whole: Path) -> None:
    change_vocabulary(broken, {"A": "Aleph", "B": "Beth"}, merges_dropped=1)
    vocabulary = json.loads((whole / "tokenizer.json").read_text())["model"]["vocab"]
    finding = finding_of("pair tokenizer", whole, broken)
    assert finding.state is State.PROBLEM
    assert f"2 of {len(vocabulary)} entries differ" in finding.message
    assert f"id {vocabulary['A']} is 'A' in base and 'Aleph' in draft" in finding.message
    assert "merges differ in number" in finding.message
    assert "same family" in finding.advice


def test_an_entry_that_only_one_has_is_named(broken: Path, whole: Path) -> None:
    path = broken / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 900, "content": "<|extra|>"})
    path.write_text(json.dumps(content))
    assert "id 900 is missing in base and '<|extra|>' in draft" in finding_of("pair tokenizer", whole, broken).message


def test_vocabularies_that_differ_only_by_padding_are_fine(tmp_path: Path, whole: Path) -> None:
    padded = write_checkpoint(tmp_path, vocab_size=384, has_tokenizer=True)
    finding = finding_of("pair tokenizer", whole, padded)
    assert finding.state is State.OK
    assert "340 and 384 entries differ only by padding" in finding.message


def test_no_tokenizer_and_no_chat_template(broken: Path) -> None:
    (broken / "chat_template.jinja").unlink()
    finding = finding_of("base tokenizer", broken)
    assert finding.state is State.WARNING
    assert "no chat template" in finding.message
    (broken / "tokenizer.json").unlink()
    assert finding_of("base tokenizer", broken).state is State.PROBLEM
    assert finding_of("pair tokenizer", broken, broken).state is State.PROBLEM


# --- the pair ---------------------------------------------------------------------------------------------------


def test_a_draft_that_is_no_smaller_or_shorter_is_a_warning(whole: Path, small: Path, broken: Path) -> None:
    assert finding_of("pair size", small, whole).state is State.WARNING
    change_config(broken, max_position_embeddings=128)
    finding = finding_of("pair context", whole, broken)
    assert finding.state is State.WARNING
    assert "128" in finding.message
