"""Headless Chromium, driven over its debugging pipe: no driver, no further package."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_TIMEOUT_S = 30.0


class Page:
    """One tab. `errors` collects uncaught exceptions, console errors and violations of the page's policy."""

    def __init__(self, browser: Browser, session_id: str) -> None:
        self._browser = browser
        self._session_id = session_id
        self.errors: list[str] = []
        self.on_request: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        browser.listeners[session_id] = self._on_event

    async def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self._browser.command(method, self._session_id, **parameters)

    def _on_event(self, method: str, parameters: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        if method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            entry = parameters["entry"]
            self.errors.append(f"{entry['text']} ({entry.get('url', '')})")

        if method == "Fetch.requestPaused":
            assert self.on_request is not None
            answer = self.on_request(parameters["request"])
            request_id = parameters["requestId"]
            if answer is None:
                reaction = self.command("Fetch.continueRequest", requestId=request_id)
            else:
                reaction = self.command("Fetch.fulfillRequest", requestId=request_id, **answer)
            self._tasks.add(asyncio.create_task(reaction))

    async def intercept(self, pattern: str, on_request: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        """Let `on_request` answer requests that match; None passes one on."""
        self.on_request = on_request
        await self.command("Fetch.enable", patterns=[{"urlPattern": pattern}])

    async def open(self, url: str) -> None:
        await self.command("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = await self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails'].get('exception', {}).get('description')}")
        return answer["result"].get("value")

    async def until(self, condition: str, timeout_s: float = _TIMEOUT_S) -> None:
        """Return when a JavaScript expression is true."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.evaluate(f"Boolean({condition})"):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        except TimeoutError:
            shown = await self.evaluate("document.body.innerText")
            raise AssertionError(
                f"{condition} did not come true; errors {self.errors}; the page says {shown!r}"
            ) from None

    async def text(self, selector: str) -> str:
        return str(await self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    async def fill(self, selector: str, value: str) -> None:
        """Put a value into an input, as typing would."""
        await self.evaluate(
            f"(i => {{ i.focus(); i.value = {json.dumps(value)};"
            " for (const kind of ['input', 'change']) i.dispatchEvent(new Event(kind, {bubbles: true})); })"
            f"(document.querySelector({json.dumps(selector)}))"
        )

    async def click(self, selector: str) -> None:
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    async def press(self, key: str, is_ctrl: bool = False) -> None:
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39}
        common = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 2 if is_ctrl else 0}
        text = {"text": "\r"} if key == "Enter" and not is_ctrl else {}
        await self.command("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        await self.command("Input.dispatchKeyEvent", type="keyUp", **common)

    async def show_as(self, width: int, height: int, is_dark: bool = False, is_reduced: bool = False) -> None:
        """Size of the window, and what the reader's system prefers."""
        await self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if is_reduced else "no-preference"},
        ]
        await self.command("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self, is_whole: bool = True) -> bytes:
        """PNG of the whole page, or of the window."""
        answer = await self.command("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        return base64.b64decode(answer["data"])


class Browser:
    """The process's pipes: commands out, answers and events in."""

    def __init__(self, reader: asyncio.StreamReader, write_descriptor: int) -> None:
        self._reader = reader
        self._write_descriptor = write_descriptor
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.listeners: dict[str, Any] = {}
        self._pump = asyncio.create_task(self._read())

    async def close(self) -> None:
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)

    async def command(self, method: str, session_id: str | None = None, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if session_id is not None:
            message["sessionId"] = session_id
        self._waiting[number] = asyncio.get_running_loop().create_future()
        os.write(self._write_descriptor, json.dumps(message).encode() + b"\0")
        return await asyncio.wait_for(self._waiting[number], _TIMEOUT_S)

    async def _read(self) -> None:
        while True:
            message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            waiting = self._waiting.pop(message.get("id", 0), None)
            if waiting is None:
                listener = self.listeners.get(message.get("sessionId", ""))
                if listener is not None:
                    listener(message["method"], message["params"])
            elif "error" in message:
                waiting.set_exception(AssertionError(str(message["error"])))
            else:
                waiting.set_result(message["result"])

    async def page(self) -> Page:
        target = await self.command("Target.createTarget", url="about:blank")
        session = await self.command("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, session["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            await page.command(f"{domain}.enable")
        return page


@asynccontextmanager
async def chromium(profile: Path) -> AsyncIterator[Browser]:
    """A browser of its own; `profile` is an empty folder for what it wants to remember."""
    assert EXECUTABLE is not None, "there is no Chromium"
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # Chromium wants the pipe as descriptors 3 and 4.
    script = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", script, EXECUTABLE, *_FLAGS, f"--user-data-dir={profile}"),
        pass_fds=(theirs_in, theirs_out),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    reader = asyncio.StreamReader(limit=2**26)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours_in, "rb")
    )
    browser = Browser(reader, ours_out)
    try:
        yield browser
    finally:
        with contextlib.suppress(AssertionError, TimeoutError, OSError):
            await asyncio.wait_for(browser.command("Browser.close"), 5)
        await browser.close()
        transport.close()
        os.close(ours_out)
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()
