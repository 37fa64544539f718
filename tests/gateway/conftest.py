"""A small byte-level BPE tokenizer, made on the spot."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.tokenizer import Tokenizer
from tests.fakes.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)
