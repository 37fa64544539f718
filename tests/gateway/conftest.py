"""A small byte-level BPE tokenizer, made on the spot, and services without models that speak with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.text.tokenizer import Tokenizer
from tests.fakes.services import TOY_TEXT, FakePair, ToyLanguage, running_pair
from tests.fakes.tiny_tokenizer import write_tokenizer
from tests.gateway.gateway_client import Client, gateway


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def language(tokenizer: Tokenizer) -> ToyLanguage:
    token_ids = tokenizer.encode(TOY_TEXT)
    return ToyLanguage(token_ids, vocab_size=352, fingerprint=tokenizer.fingerprint)


@pytest.fixture
async def pair(language: ToyLanguage) -> AsyncIterator[FakePair]:
    async with running_pair(language) as pair:
        yield pair


@pytest.fixture
async def client(pair: FakePair, tokenizer_folder: Path) -> AsyncIterator[Client]:
    async with gateway(pair, tokenizer_folder) as client:
        yield client
