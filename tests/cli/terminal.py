"""A command at a terminal of its own: what it shows, and keys for it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.cli.conftest import CHECKOUT

CTRL_C, CTRL_D = "\x03", "\x04"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# Makes stdin the controlling terminal, so that Ctrl-C becomes SIGINT. Not in a preexec_fn: gRPC minds the fork.
_TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    # Ignored where the tests run in the background of a script, and programs inherit that.
    "signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Terminal:
    """The pty's other end. `shown` is everything so far, escapes included."""

    def __init__(self, process: asyncio.subprocess.Process, descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._changed = asyncio.Event()
        self.shown = ""
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # the program has closed its side
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self.shown += data.decode(errors="replace")
        self._changed.set()

    @property
    def text(self) -> str:
        """What is shown, without escapes."""
        return _ESCAPES.sub("", self.shown)

    def type(self, keys: str) -> None:
        os.write(self._descriptor, keys.encode())

    async def expect(self, text: str, times: int = 1, timeout_s: float = 20) -> None:
        """Return when `text` has been shown that often."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.text.count(text) < times:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{text!r} was not shown {times} times in {self.text!r}") from None

    async def press_until(self, keys: str, text: str, times: int) -> None:
        """Type `keys` once a second until `text` has been shown that often.

        input() misses a signal that comes between a key's echo and its next wait. No person is so fast, but a test is,
        and on a busy machine that moment is long.
        """
        for _ in range(20):
            self.type(keys)
            with contextlib.suppress(AssertionError):
                return await self.expect(text, times, timeout_s=1)
        raise AssertionError(f"{keys!r} does not lead to {text!r}: {self.text!r}")

    async def ended(self) -> int:
        """The exit code."""
        async with asyncio.timeout(20):
            return await self.process.wait()


@asynccontextmanager
async def at_terminal(*arguments: str) -> AsyncIterator[Terminal]:
    """The `easyspec` command at a terminal; killed at the end if it still runs."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", _TAKE_TERMINAL, "-m", "easyspec.cli.main"),
        *arguments,
        cwd=CHECKOUT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        | {"TERM": "xterm", "COLUMNS": "120"},
        start_new_session=True,
    )
    os.close(theirs)
    terminal = Terminal(process, ours)
    try:
        yield terminal
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(ours)
        os.close(ours)
