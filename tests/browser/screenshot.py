"""Takes the documents' pictures of the page: `python -m tests.browser.screenshot http://127.0.0.1:8000 docs/images`."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.browser.chromium import Page, chromium

_QUESTION = "Write a Python function that checks whether a word is a palindrome."
_DESKTOP, _PHONE = (1240, 860), (390, 844)
_TIMEOUT_S = 240.0


async def _answered(page: Page, url: str) -> None:
    await page.open(url)
    await page.until("document.querySelector('.dot').dataset.state === 'ready'", _TIMEOUT_S)
    await page.fill("#temperature", "0")
    await page.fill("#max_tokens", "256")
    await page.fill("#message", _QUESTION)
    await page.press("Enter")
    await page.until("document.querySelector('.foot:not([hidden])')", _TIMEOUT_S)


async def _picture(page: Page, path: Path) -> None:
    await page.evaluate("document.activeElement.blur()")
    content = await page.screenshot(is_whole=False)
    await asyncio.to_thread(path.write_bytes, content)


async def _take(url: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        async with chromium(Path(profile)) as browser:
            page = await browser.page()
            await page.show_as(*_DESKTOP)
            await _answered(page, url)
            await page.click("#look-inside")
            await page.click("#race")
            await page.until("document.querySelector('#verdict .same, #verdict .differs')", _TIMEOUT_S)
            await page.evaluate("document.querySelector('#thread').scrollTop = 0")
            await _picture(page, folder / "playground.png")
            await page.show_as(*_DESKTOP, is_dark=True)
            await _picture(page, folder / "playground-dark.png")
            await page.click("#close-inside")
            await page.show_as(*_PHONE)
            await page.evaluate("document.querySelector('#thread').scrollTop = 0")
            await _picture(page, folder / "playground-phone.png")


if __name__ == "__main__":
    asyncio.run(_take(sys.argv[1], Path(sys.argv[2])))
