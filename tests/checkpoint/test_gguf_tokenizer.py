"""A GGUF file's tokenizer is that of the folder it was made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog
from transformers import PreTrainedTokenizerFast

from easyspec.checkpoint.generation import end_token_ids, sampling_defaults
from easyspec.checkpoint.gguf_header import read_header
from easyspec.checkpoint.tokenizer_files import load_backend, load_tokenizer
from easyspec.datastore.corpus import load_tokenizer as corpus_tokenizer
from easyspec.errors import ConfigurationError
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.parameters import Grammar, GrammarKind
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint, tokens_by_id
from gateway.text.conversation import ChatTurn, Conversation
from gateway.text.tokenizer import Tokenizer
from tests.fakes.checkpoints import write_checkpoint
from tests.fakes.gguf_files import write_gguf
from tests.fakes.tiny_tokenizer import END_OF_TEXT, TEXTS, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 344 rows, whose tokenizer has 340 entries."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tiny"), num_hidden_layers=1, vocab_size=344)
    return write_tokenizer(folder, 340)


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write_gguf(folder, folder / "tiny.gguf")


@pytest.mark.parametrize("text", [*TEXTS, "  12 34567\n\n\tx", f"a{END_OF_TEXT}b", "", "日本"])
def test_texts_get_the_same_tokens(folder: Path, file: Path, text: str) -> None:
    ours, theirs = Tokenizer.load(file), Tokenizer.load(folder)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert load_backend(file).encode(text).ids == load_backend(folder).encode(text).ids
    assert list(corpus_tokenizer(file).encode(text).ids) == list(corpus_tokenizer(folder).encode(text).ids)


def test_the_vocabulary_is_the_same_without_what_fills_it_up(folder: Path, file: Path) -> None:
    assert len(read_header(file).tokens) == 344
    assert tokens_by_id(file) == tokens_by_id(folder)
    assert tokenizer_fingerprint(file) == tokenizer_fingerprint(folder)
    assert Tokenizer.load(file).special_token_ids == Tokenizer.load(folder).special_token_ids


def test_conversations_and_ends_are_the_files(folder: Path, file: Path) -> None:
    conversation = Conversation((ChatTurn("user", "hi"),))
    ours = Tokenizer.load(file)
    assert ours.prompt_of(conversation).token_ids == Tokenizer.load(folder).prompt_of(conversation).token_ids
    assert read_header(file).end_token_ids == (0,)
    assert end_token_ids(file, [0]) == (0,)


async def test_grammars_are_compiled_for_it(file: Path) -> None:
    compiled = await GrammarCompiler(file, 344, (0,)).compile(Grammar(GrammarKind.REGEX, "[a-z]+"))
    assert compiled.vocab_size == 344


def test_single_digits_are_cut_where_the_file_says_so(folder: Path, tmp_path: Path) -> None:
    file = write_gguf(folder, tmp_path / "digits.gguf", metadata={"tokenizer.ggml.pre": "smollm"})
    words = load_backend(file).pre_tokenizer.pre_tokenize_str("ab  12")
    assert [word for word, _ in words] == ["ab", "ĠĠ", "1", "2"]
    plain = write_gguf(folder, tmp_path / "plain.gguf")
    words = load_backend(plain).pre_tokenizer.pre_tokenize_str("ab  12")
    assert [word for word, _ in words] == ["ab", "Ġ", "Ġ12"]


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tokenizer.ggml.bos_token_id": 5, "tokenizer.ggml.add_bos_token": True},
        {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True},
        {"tokenizer.ggml.token_type": [3, 4, 3, *[1] * 341]},
    ],
    ids=["plain", "begins", "ends", "known texts"],
)
def test_it_is_what_transformers_makes_of_the_file(folder: Path, tmp_path: Path, metadata: dict[str, Any]) -> None:
    file = write_gguf(folder, tmp_path / "tiny.gguf", metadata={"tokenizer.chat_template": "{{ 1 }}", **metadata})
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path, gguf_file=file.name, local_files_only=True)
    ours = load_tokenizer(file)
    expected = json.loads(theirs.backend_tokenizer.to_str())
    assert json.loads(ours.backend_tokenizer.to_str()) == expected
    assert json.loads(load_backend(file).to_str()) == expected
    assert (ours.special_tokens_map, ours.all_special_ids) == (theirs.special_tokens_map, theirs.all_special_ids)
    assert ours.chat_template == theirs.chat_template
    assert ours("def f(12):")["input_ids"] == theirs("def f(12):")["input_ids"]


def test_neither_torch_nor_what_takes_seconds_is_imported(file: Path) -> None:
    """By the gateway torch, by processes that compile grammars transformers either."""
    script = (
        "import sys; from pathlib import Path; from easyspec.checkpoint.tokenizer_files import *;"
        "load_backend(Path(sys.argv[1])); assert 'transformers' not in sys.modules;"
        "load_tokenizer(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(file)], check=True, timeout=120)


def test_an_unknown_rule_is_warned_of(folder: Path, tmp_path: Path) -> None:
    file = write_gguf(folder, tmp_path / "odd.gguf", metadata={"tokenizer.ggml.pre": "never-heard-of"})
    with structlog.testing.capture_logs() as logs:
        load_tokenizer(file)
    assert [entry["rule"] for entry in logs if entry["event"] == "unknown_tokenizer_rule"] == ["never-heard-of"]


def test_a_file_may_ask_for_its_sampling(folder: Path, tmp_path: Path) -> None:
    asked = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20, "general.sampling.top_p": 0.75}
    file = write_gguf(folder, tmp_path / "asking.gguf", metadata=asked)
    assert sampling_defaults(file).given == {"temperature": 0.5, "top_k": 20, "top_p": 0.75}


def test_a_file_without_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_hidden_layers=1)
    file = write_gguf(tmp_path, tmp_path / "bare.gguf")
    with pytest.raises(ConfigurationError, match=r"the file has no tokenizer\.ggml\.tokens"):
        Tokenizer.load(file)
