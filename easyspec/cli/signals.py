"""Ctrl-C and SIGTERM as cancellation, so that `finally` cleans up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any


def run_until_signal(work: Coroutine[Any, Any, None]) -> int:
    """Run to the end, or until SIGINT or SIGTERM cancels it; returns 0, or 128 + the signal's number.

    Further signals are ignored: stopping is under way and bounded.
    """
    received: list[signal.Signals] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)

        def stop(number: signal.Signals) -> None:
            if not received:
                received.append(number)
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        try:
            await task
        except asyncio.CancelledError:
            if not received:
                raise

    asyncio.run(main())
    return 128 + received[0] if received else 0
