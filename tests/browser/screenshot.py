"""Takes the README's picture of the playground: `python -m tests.browser.screenshot http://127.0.0.1:8000 FILE.png`."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.browser.chromium import chromium

_SEED = "3"
_WIDTH, _HEIGHT = 1180, 1130


async def _take(url: str) -> bytes:
    with tempfile.TemporaryDirectory() as profile:
        async with chromium(Path(profile)) as browser:
            page = await browser.page()
            await page.show_as(_WIDTH, _HEIGHT)
            await page.open(url)
            await page.until("document.querySelector('.dot').dataset.state === 'ready'")
            await page.fill("#seed", _SEED)
            await page.click("#run")
            await page.until("document.querySelector('#verdict .same, #verdict .differs')", timeout_s=120)
            await page.evaluate("document.activeElement.blur()")
            return await page.screenshot(is_whole=False)


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(asyncio.run(_take(sys.argv[1])))
