"""What is read for training, and above all what is not."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from models.heldout import held_out_modules, held_out_prompts, held_out_texts
from models.recipe.chat import chat_documents
from models.recipe.corpus import (
    Kind,
    admitted_names,
    is_held_out,
    source_documents,
    training_pass,
)
from models.recipe.settings import CorpusSettings

_DOCUMENTED = '''
class Stack:
    """A last-in, first-out container."""

    def push(self, item):
        """Put item on top.

        Return nothing."""
        self.items.append(item)

    def bare(self):
        return None
'''


_FILES = {
    "heapq.py": "held_out = 1\n",
    "stack.py": _DOCUMENTED + "\n# padding\n" * 400,
    "json/__init__.py": _DOCUMENTED,
    "encodings/cp037.py": "decoding_table = ()\n",
    "encodings/aliases.py": "aliases = {}\n",
    "lib2to3/tests/data/bom.py": "x = 1\n",
    "numbers_only.py": "0123456789" * 20,
    "test/test_heapq.py": "held_out = 2\n",
    "test/test_stack.py": "import stack\n",
    "test/test_json/test_dump.py": "import json\n",
    "test/test_re.py": "import re\n",
    "test/test_os.py": "import os\n",
    "site-packages/other.py": "x = 1\n",
    "pydoc_data/topics.py": "topics = {'assert': 'Prose.'}\n",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> CorpusSettings:
    """Settings for a small library tree with one of everything."""
    stdlib = tmp_path_factory.mktemp("stdlib")
    for name, text in _FILES.items():
        path = stdlib / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (stdlib / "latin.py").write_bytes(b"# caf\xe9\n")
    return CorpusSettings(stdlib=stdlib)


def test_held_out_modules_and_their_tests_are_not_admitted() -> None:
    names = admitted_names(CorpusSettings().stdlib)
    modules = set(held_out_modules())
    assert len(names) > 500
    for name in names:
        parts = name.removesuffix(".py").split("/")
        assert parts[0] not in modules, name
        assert not {part.removeprefix("test_") for part in parts if "test_" in part} & modules


@pytest.mark.slow
def test_held_out_text_does_not_appear_in_training_documents() -> None:
    """Neighbours in the library share a few paragraphs (imghdr and sndhdr), not more."""
    trained = "".join(document.text for document in training_pass(CorpusSettings(), 0))
    paragraphs = [
        paragraph for text in held_out_texts().values() for paragraph in text.split("\n\n") if len(paragraph) > 200
    ]
    num_shared = sum(paragraph in trained for paragraph in paragraphs)
    assert num_shared < 0.02 * len(paragraphs)


def test_only_utf_8_code_and_prose_is_read(library: CorpusSettings) -> None:
    assert [document.name for document in source_documents(library)] == [
        "encodings/aliases.py",
        "json/__init__.py",
        "stack.py",
        "test/test_json/test_dump.py",
        "test/test_os.py",
        "test/test_re.py",
        "test/test_stack.py",
    ]
    prose = [d.text for d in training_pass(library, 0) if d.kind is Kind.PROSE]
    assert prose == ["Prose.\n"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("heapq.py", True),
        ("test/test_heapq.py", True),
        ("test/test_csv.py", True),
        ("test/test_csvx.py", False),
        ("json/decoder.py", False),
        ("email/heapq_like.py", False),
        ("distutils/cmd.py", False),
    ],
)
def test_is_held_out_goes_by_top_level_module_and_test_name(name: str, expected: bool) -> None:
    assert is_held_out(name) is expected


def test_passes_are_deterministic_and_share_out_the_tests(library: CorpusSettings) -> None:
    assert training_pass(library, 0) == training_pass(library, 0)
    assert training_pass(replace(library, seed=1), 0) != training_pass(library, 0)
    passes = [training_pass(library, index) for index in range(library.passes_per_test)]
    tests = [d.name for documents in passes for d in documents if d.kind is Kind.TEST]
    assert sorted(tests) == sorted(n for n in admitted_names(library.stdlib) if "test/" in n)
    for documents in passes:
        assert sum(d.kind is Kind.LIBRARY for d in documents) == 3


def test_chat_is_kept_to_its_share(library: CorpusSettings) -> None:
    for share, expected in ((0.0, 0), (0.01, 1), (0.5, 4)):
        documents = training_pass(replace(library, chat_share=share), 0)
        assert sum(d.kind is Kind.CHAT for d in documents) == expected


def test_chat_documents_are_chat_ml_about_documented_code_only() -> None:
    examples = list(chat_documents("stack.py", _DOCUMENTED, CorpusSettings()))
    assert [name for name, _ in examples] == ["stack.py#Stack@2", "stack.py#push@5"]
    for _, text in examples:
        assert text.count("<|im_start|>assistant\n") == 1
        assert text.endswith("<|im_end|>\n")
    assert list(chat_documents("broken.py", "def (:", CorpusSettings())) == []


def test_held_out_prompts_are_deterministic_distinct_and_end_at_code() -> None:
    prompts = held_out_prompts(40, seed=3, max_chars=600)
    assert prompts == held_out_prompts(40, seed=3, max_chars=600)
    assert prompts != held_out_prompts(40, seed=4, max_chars=600)
    assert len(set(prompts)) == 40
    text = "\n".join(held_out_texts().values())
    for prompt in random.Random(0).sample(prompts, 10):
        assert 80 <= len(prompt) <= 600
        assert prompt == prompt.rstrip()
        assert prompt in text


def test_held_out_prompts_refuse_what_cannot_be_had() -> None:
    with pytest.raises(ValueError, match="num_prompts must be at most"):
        held_out_prompts(10**6, seed=0, max_chars=400)
    with pytest.raises(ValueError, match="max_chars must be at least"):
        held_out_prompts(1, seed=0, max_chars=10)
