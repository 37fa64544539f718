"""The training corpus: CPython's standard library without the held-out modules."""

from __future__ import annotations

import ast
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from models.heldout import held_out_modules
from models.recipe.chat import chat_documents
from models.recipe.settings import CorpusSettings

_PRUNED_FOLDERS = frozenset({"site-packages", "__pycache__"})
_TEST_DATA = "lib2to3/tests/data/"
_TABLE_MODULES = frozenset({"html/entities.py", "pydoc_data/topics.py", "stringprep.py"})
_CODE_OF_ENCODINGS = frozenset({"__init__", "aliases", "idna", "punycode", "utf_8_sig"})


class Kind(Enum):
    """What a document is, which decides how often it is seen."""

    LIBRARY = "library"
    TEST = "test"
    PROSE = "prose"
    CHAT = "chat"


@dataclass(frozen=True)
class Document:
    """One training document; `name` is a path below the standard library, `/`-separated."""

    name: str
    kind: Kind
    text: str


def is_held_out(name: str) -> bool:
    """Tell whether a path below the standard library belongs to a held-out module or its tests."""
    stems = [part.removesuffix(".py") for part in name.split("/")]
    modules = set(held_out_modules())
    owners = {stem.removeprefix("test_") for stem in stems if stem.startswith("test_")}
    return stems[0] in modules or bool(owners & modules)


def source_documents(settings: CorpusSettings) -> Iterator[Document]:
    """Yield the admitted source files in sorted order."""
    for name in admitted_names(settings.stdlib):
        text = _read(settings.stdlib / name, settings)
        if text is not None:
            is_test = not {"test", "tests", "idle_test"}.isdisjoint(name.split("/")[:-1])
            kind = Kind.TEST if is_test else Kind.LIBRARY
            yield Document(name, kind, text)


def admitted_names(stdlib: Path) -> list[str]:
    """Return the sorted paths below `stdlib` of the source files that may be trained on."""
    paths: list[Path] = []
    for folder, subfolders, files in os.walk(stdlib):
        subfolders[:] = [name for name in subfolders if name not in _PRUNED_FOLDERS]
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    names = (path.relative_to(stdlib).as_posix() for path in sorted(paths))
    return [name for name in names if not is_held_out(name) and not _is_table(name)]


def prose_documents(stdlib: Path) -> Iterator[Document]:
    """Yield the language reference's topics that ship for `help()`."""
    path = stdlib / "pydoc_data" / "topics.py"
    assignment = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    if not isinstance(assignment, ast.Assign | ast.AnnAssign) or assignment.value is None:
        raise ValueError(f"{path} does not end in an assignment of topics")
    topics: dict[str, str] = ast.literal_eval(assignment.value)
    for topic in sorted(topics):
        yield Document(f"pydoc_data/topics.py#{topic}", Kind.PROSE, topics[topic].strip() + "\n")


def training_pass(settings: CorpusSettings, pass_index: int) -> list[Document]:
    """Return one shuffled pass: all library code and prose, some of the tests, a share of chat.

    `passes_per_test` consecutive passes cover every test once and all library code every time.
    Documents of one pass are distinct. Equal arguments give equal lists on one Python version.
    """
    sources = list(source_documents(settings))
    tests = [document for document in sources if document.kind is Kind.TEST]
    plain = [document for document in sources if document.kind is Kind.LIBRARY]
    order = random.Random(settings.seed)
    order.shuffle(tests)
    every = settings.passes_per_test
    chosen = [*plain, *prose_documents(settings.stdlib), *tests[pass_index % every :: every]]
    chat = [
        Document(name, Kind.CHAT, text)
        for document in plain
        for name, text in chat_documents(document.name, document.text, settings)
    ]
    order.shuffle(chat)
    wanted = sum(len(document.text) for document in chosen) * settings.chat_share / (1 - settings.chat_share)
    num_before = itertools.accumulate((len(document.text) for document in chat), initial=0)
    chosen += [document for document, num_chars in zip(chat, num_before, strict=False) if num_chars < wanted]
    random.Random(settings.seed * 1_000 + pass_index).shuffle(chosen)
    return chosen


def _is_table(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder == "encodings":
        return file.removesuffix(".py") not in _CODE_OF_ENCODINGS
    is_generated = name in _TABLE_MODULES or file.startswith("_sysconfigdata")
    return is_generated or name.startswith(_TEST_DATA)


def _read(path: Path, settings: CorpusSettings) -> str | None:
    """Return the text, or None where it is not UTF-8, empty, oversized or mostly numbers."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\n")
    num_digits = sum(map(text.count, "0123456789"))
    too_many_digits = num_digits > settings.max_digit_share * len(text)
    if not text.strip() or len(text) > settings.max_document_chars or too_many_digits:
        return None
    return text
