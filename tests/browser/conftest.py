"""The page in headless Chromium, on a gateway with fakes behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.text.tokenizer import Tokenizer
from tests.browser.chromium import Page, chromium
from tests.fakes.services import TOY_TEXT, ToyLanguage, running_pair
from tests.fakes.tiny_tokenizer import write_tokenizer
from tests.gateway.rest.conftest import Rest, serving_rest

NUM_TOKENS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
async def rest(folder: Path) -> AsyncIterator[Rest]:
    tokenizer = Tokenizer.load(folder)
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint)
    async with running_pair(language) as pair, serving_rest(pair, folder) as rest:
        yield rest


@pytest.fixture
async def page(rest: Rest, tmp_path: Path) -> AsyncIterator[Page]:
    """The page, ready, for short greedy answers; at the end nothing may have gone wrong that a test did not expect."""
    async with chromium(tmp_path / "profile") as browser:
        page = await browser.page()
        await page.show_as(1240, 900)
        await page.open(rest.base_url)
        await page.until("document.querySelector('.dot').dataset.state === 'ready'")
        await page.fill("#max_tokens", str(NUM_TOKENS))
        await page.fill("#temperature", "0")
        await page.fill("#mode", "on")
        yield page
        assert page.errors == []
