"""One gateway for all tests of a module, its fakes as new for each: tests here run in the module's event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from models.recipe.chat import CHAT_TEMPLATE
from tests.fakes.services import ToyLanguage, running_pair
from tests.fakes.tiny_tokenizer import write_tokenizer
from tests.gateway.rest.conftest import Rest, serving_rest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_rest(language: ToyLanguage, tokenizer_folder: Path) -> AsyncIterator[Rest]:
    async with running_pair(language) as pair, serving_rest(pair, tokenizer_folder) as rest:
        yield rest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_tool_rest(language: ToyLanguage, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rest]:
    folder = write_tokenizer(tmp_path_factory.mktemp("tools"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    async with running_pair(language) as pair, serving_rest(pair, folder) as rest:
        yield rest


@pytest.fixture
def rest(shared_rest: Rest, language: ToyLanguage) -> Rest:
    return as_new(shared_rest, language)


@pytest.fixture
def tool_rest(shared_tool_rest: Rest, language: ToyLanguage) -> Rest:
    """A gateway whose chat template knows tools."""
    return as_new(shared_tool_rest, language)


def as_new(rest: Rest, language: ToyLanguage) -> Rest:
    verifier, drafter = rest.pair.verifier, rest.pair.drafter
    for engine in (verifier, drafter):
        engine.language, engine.delay_s, engine.error, engine.open_error = language, 0.0, None, None
    drafter.tree, drafter.wrong_every = None, 5
    verifier.trees.clear()
    return rest
