"""From text to the files that drafters guess from: text is cut into tokens once, and both files are made at once."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from easyspec.datastore.corpus import load_tokenizer, write_tokens
from easyspec.datastore.ngram_table import build_ngram_table
from easyspec.datastore.suffix_index import build_suffix_index
from easyspec.errors import ConfigurationError
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint

OnStage = Callable[[str, float], None]
"""Told when a stage is done: what was made, and the seconds that it took."""

FileBuilder = Callable[[np.ndarray, Path, str], None]


@dataclass(frozen=True)
class DatastoreFiles:
    """What to write; None: not that."""

    index: Path | None = None
    ngrams: Path | None = None


def build_datastore(
    documents: Iterable[str], tokenizer_folder: Path, files: DatastoreFiles, on_stage: OnStage = lambda *_: None
) -> int:
    """Write the files and return the number of tokens, separators included.

    Two files are made by two processes, each of which needs memory for itself. A file appears when it is complete.
    Raises ConfigurationError for a tokenizer or a corpus that cannot be used.
    """
    fingerprint = tokenizer_fingerprint(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    builders: list[tuple[FileBuilder, Path | None]] = [
        (build_suffix_index, files.index),
        (build_ngram_table, files.ngrams),
    ]
    wanted = [(build_file, path) for build_file, path in builders if path is not None]
    for _, path in wanted:
        if not path.parent.is_dir():
            raise ConfigurationError(f"output is {str(path)!r}; allowed: a file in a folder that exists")
    started_s = time.monotonic()
    with tempfile.NamedTemporaryFile(dir=wanted[0][1].parent, prefix=".tokens-") as file:
        num_tokens = write_tokens(documents, tokenizer, file)
        file.flush()
        if num_tokens == 0:
            raise ConfigurationError("the corpus holds no text")
        on_stage(f"{num_tokens:,} tokens", time.monotonic() - started_s)
        _build_all(wanted, Path(file.name), fingerprint, on_stage)
    return num_tokens


def _build_all(wanted: list[tuple[FileBuilder, Path]], tokens: Path, fingerprint: str, on_stage: OnStage) -> None:
    """The last file here, the others each in a process of its own."""
    *others, (build_file, path) = wanted
    # Spawned, not forked: the tokenizer has threads.
    with ProcessPoolExecutor(max(1, len(others)), multiprocessing.get_context("spawn")) as processes:
        under_way = [processes.submit(_build, build_other, tokens, other, fingerprint) for build_other, other in others]
        on_stage(path.name, _build(build_file, tokens, path, fingerprint))
        for (_, other), future in zip(others, under_way, strict=True):
            on_stage(other.name, future.result())


def _build(build_file: FileBuilder, tokens: Path, path: Path, fingerprint: str) -> float:
    """Build one file; returns the seconds that it took."""
    started_s = time.monotonic()
    build_file(np.memmap(tokens, dtype="<u4", mode="r"), path, fingerprint)
    return time.monotonic() - started_s
