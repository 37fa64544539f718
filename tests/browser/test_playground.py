"""The playground page in headless Chromium, on a gateway with fakes behind it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.tokenizer import Tokenizer
from tests.browser.chromium import EXECUTABLE, Page, chromium
from tests.fakes.services import TOY_TEXT, FakePair, FakeVerifierEngine, ToyLanguage, running, running_pair
from tests.fakes.tiny_tokenizer import write_tokenizer
from tests.gateway.rest.conftest import Rest, serving_rest
from verifier_service.server import VerifierServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        EXECUTABLE is None, reason="NO CHROMIUM HERE: the playground page is NOT tested (install chromium)"
    ),
]

PROMPT = "def f(n):"
NUM_TOKENS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
async def rest(folder: Path) -> AsyncIterator[Rest]:
    tokenizer = Tokenizer.load(folder)
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint())
    async with running_pair(language) as pair, serving_rest(pair, folder) as rest:
        yield rest


@pytest.fixture
async def page(rest: Rest, tmp_path: Path) -> AsyncIterator[Page]:
    """The page, ready, with a short prompt; at the end nothing may have gone wrong that a test did not expect."""
    async with chromium(tmp_path / "profile") as browser:
        page = await browser.page()
        await page.show_as(1240, 900)
        await page.open(rest.base_url)
        await page.until("document.querySelector('.dot').dataset.state === 'ready'")
        await page.fill("#prompt", PROMPT)
        await page.fill("#max_tokens", str(NUM_TOKENS))
        await page.fill("#seed", "0")
        yield page
        assert page.errors == []


def expected_text(folder: Path, pair: FakePair) -> str:
    tokenizer = Tokenizer.load(folder)
    start, cycle = len(tokenizer.encode(PROMPT)), pair.language.token_ids
    return tokenizer.decode([cycle[(start + i) % len(cycle)] for i in range(NUM_TOKENS)])


async def run(page: Page) -> None:
    await page.evaluate("document.querySelector('#prompt').focus()")
    await page.press("Enter", is_ctrl=True)
    await page.until(
        "!document.querySelector('#run').disabled && document.querySelector('#verdict .same, #verdict .differs')"
    )


async def test_a_run_shows_text_tree_levels_stages_race_and_totals(page: Page, rest: Rest, folder: Path) -> None:
    rest.pair.verifier.delay_s = 0.01
    await run(page)
    assert await page.text("#answer") == PROMPT + expected_text(folder, rest.pair)
    assert await page.text("#verdict .same") == "✓ identical text"
    numbers = await page.evaluate(
        "['#answer .accepted', '#answer .bonus', '#tree .accepted rect', '#tree .rejected rect', '#tree .bonus rect',"
        " '#tree .root rect', '#levels tr', '#stages rect.verify', '#totals dt']"
        ".map(selector => document.querySelectorAll(selector).length)"
    )
    accepted, bonus, tree_accepted, tree_rejected, tree_bonus, roots, levels, stages, totals = numbers
    assert accepted > bonus > 0
    assert min(tree_accepted, tree_rejected) > 0
    assert (tree_bonus, roots, levels, totals) == (1, 1, 5, 8)
    # The drafted run and the plain one each asked for every pass once, with one seed.
    trees = rest.pair.verifier.trees
    assert sum(len(tree) == 0 for tree in trees[-NUM_TOKENS:]) == NUM_TOKENS
    assert stages == len(trees) - NUM_TOKENS - 1
    assert "level 1" in await page.text("#levels")
    assert "60" in await page.text("#totals")
    assert (await page.text("#status")).startswith("Done: 60 tokens.")


async def test_before_the_first_run_an_example_shows_what_to_look_for(page: Page) -> None:
    assert (await page.text("#tree-words")).startswith("For example: 8 guesses, 3 kept (“·cat·sat·on”)")
    assert await page.evaluate("document.querySelectorAll('#tree .accepted rect').length") == 3
    assert await page.evaluate("document.querySelector('#tree svg').getAttribute('role')") == "img"


async def test_rounds_can_be_looked_at_again_by_key_and_by_click(page: Page) -> None:
    await run(page)
    await page.click("#answer [data-round='2']")
    assert await page.evaluate("document.querySelector('#round').value") == "2"
    assert (await page.text("#round-name")).startswith("round 3 of")
    assert await page.evaluate("[...document.querySelectorAll('.now')].every(token => token.dataset.round === '2')")
    words = await page.text("#tree-words")
    await page.evaluate("document.querySelector('#round').focus()")
    await page.press("ArrowRight")
    await page.until("document.querySelector('#round-name').textContent.startsWith('round 4 of')")
    assert await page.text("#tree-words") != words


async def test_escape_stops_the_run_and_frees_the_services(page: Page, rest: Rest) -> None:
    rest.pair.verifier.delay_s = 0.1
    await page.fill("#max_tokens", "500")
    await page.press("Enter", is_ctrl=True)
    await page.until("document.querySelectorAll('#answer .t').length > 5")
    assert rest.pair.verifier.sessions
    await page.press("Escape")
    await page.until("!document.querySelector('#run').disabled")
    assert await page.text("#status") == "Stopped."
    async with asyncio.timeout(5):
        while not rest.is_idle():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_refusal_is_told_and_leads_to_its_field(page: Page) -> None:
    await page.fill("#temperature", "-3")
    await page.click("#run")
    await page.until("!document.querySelector('#error').hidden")
    assert "temperature is -3.0" in await page.text("#error-message")
    assert await page.evaluate("document.activeElement.id") == "temperature"
    assert await page.evaluate("document.activeElement.getAttribute('aria-invalid')") == "true"
    assert [error for error in page.errors if "400" not in error] == []
    page.errors.clear()
    await page.fill("#temperature", "0")
    await run(page)
    assert await page.evaluate("document.querySelector('#error').hidden")


async def test_a_missing_key_is_asked_for_and_kept_in_the_tab_only(page: Page) -> None:
    keys: list[str | None] = []

    def guard(request: dict[str, Any]) -> dict[str, Any] | None:
        keys.append(request["headers"].get("authorization") or request["headers"].get("Authorization"))
        if keys[-1] == "Bearer open sesame":
            return None
        error = {"error": {"message": "no API key was given", "type": "x", "param": None, "code": "invalid_api_key"}}
        return {"responseCode": 401, "body": base64.b64encode(json.dumps(error).encode()).decode()}

    await page.intercept("*/v1/completions", guard)
    await page.click("#run")
    await page.until("!document.querySelector('#key-form').hidden")
    assert await page.text("#error-message") == "no API key was given"
    assert await page.evaluate("document.activeElement.id") == "api-key"
    await page.fill("#api-key", "open sesame")
    await page.press("Enter")
    await page.until("document.querySelector('#verdict .same')")
    assert keys == [None, "Bearer open sesame", "Bearer open sesame"]
    assert await page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    assert await page.evaluate("document.querySelector('#error').hidden")
    page.errors.clear()  # the 401


async def test_a_gateway_that_goes_away_in_mid_answer_is_told(page: Page, rest: Rest) -> None:
    rest.pair.verifier.delay_s = 0.05
    await page.fill("#max_tokens", "500")
    await page.click("#run")
    await page.until("document.querySelectorAll('#answer .t').length > 5")
    await rest.gateway.drain(0.0)
    await page.until("!document.querySelector('#error').hidden")
    assert "draining" in await page.text("#error-message")
    assert not await page.evaluate("document.querySelector('#run').disabled")
    page.errors.clear()


@pytest.mark.parametrize(("width", "is_dark"), [(1240, False), (1240, True), (390, False), (320, True)])
async def test_it_fits_every_width_and_follows_the_readers_colours(page: Page, width: int, is_dark: bool) -> None:
    await page.show_as(width, 844, is_dark=is_dark, is_reduced=True)
    await run(page)
    assert await page.evaluate("document.documentElement.scrollWidth") <= width
    red = await page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0])")
    assert (red < 60) == is_dark
    durations = await page.evaluate(
        "[...document.querySelectorAll('*')].map(e => getComputedStyle(e).transitionDuration)"
    )
    assert set(durations) == {"0s"}


async def test_where_there_are_several_models_one_is_chosen(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), 352, tokenizer.fingerprint())
    backwards = replace(language, token_ids=language.token_ids[::-1], model_fingerprint="5a11")
    small = FakeVerifierEngine(backwards)
    async with running_pair(language) as pair, running(VerifierServer(small)) as small_service:
        further = {"small": {"verifier_address": small_service.address}}
        async with (
            serving_rest(pair, folder, further_models=further) as rest,
            chromium(tmp_path / "profile") as browser,
        ):
            page = await browser.page()
            await page.open(rest.base_url)
            await page.until(
                "document.querySelector('#service-text').textContent.startsWith('models toy-base, small: ')"
            )
            assert not await page.evaluate("document.querySelector('#model-field').hidden")
            await page.fill("#max_tokens", "8")
            await run(page)
            assert pair.verifier.trees
            assert not small.trees
            num_first = len(pair.verifier.trees)
            await page.fill("#model", "small")
            await page.until("performance.now() > 6000")  # the list is read again meanwhile, and keeps the choice
            await run(page)
            assert small.trees
            assert len(pair.verifier.trees) == num_first
            assert page.errors == []


async def test_where_there_is_one_model_nothing_is_to_be_chosen(page: Page, rest: Rest) -> None:
    assert (await page.text("#service-text")).startswith("model toy-base: ")
    assert await page.evaluate("document.querySelector('#model-field').hidden")
