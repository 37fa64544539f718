"""From text to one long row of token ids on disk, documents apart."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from easyspec.checkpoint.tokenizer_files import load_backend
from easyspec.errors import ConfigurationError

if TYPE_CHECKING:  # drafters read what was built, and need no tokenizer for it
    from tokenizers import Tokenizer

SEPARATOR = 0xFFFFFFFF
"""Stands after every document; no token has this id."""

_BATCH_DOCUMENTS = 256


Tokens = npt.NDArray[np.uint32]


def read_documents(paths: Iterable[Path]) -> Iterator[str]:
    """The text of every file, folders recursively, in sorted order; a line of a .jsonl file is a document (`text`).

    Files that are not UTF-8 are passed over. Raises ConfigurationError for a path that is not there, or a line of a
    .jsonl file without a text.
    """
    for path in paths:
        if not path.exists():
            raise ConfigurationError(f"corpus {str(path)!r} does not exist; allowed: files and folders of text")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        for file in files:
            try:
                text = file.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if file.suffix != ".jsonl":
                yield text
                continue
            for number, line in enumerate(text.splitlines(), start=1):
                try:
                    document = str(json.loads(line)["text"]) if line.strip() else None
                except (ValueError, KeyError, TypeError) as error:
                    where = f"{file}, line {number}"
                    raise ConfigurationError(f"{where}, is not an object with a text: {error!r}") from error
                if document is not None:
                    yield document


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder or a GGUF file; raises ConfigurationError."""
    tokenizer: Tokenizer = load_backend(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def write_tokens(documents: Iterable[str], tokenizer: Tokenizer, file: IO[bytes]) -> int:
    """Append each document's token ids and a separator to `file` as uint32; returns how many numbers that were."""
    num_tokens = 0
    rest = iter(documents)
    while batch := list(islice(rest, _BATCH_DOCUMENTS)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            tokens = np.array([*encoding.ids, SEPARATOR], dtype="<u4")
            file.write(tokens.tobytes())
            num_tokens += len(tokens)
    return num_tokens
