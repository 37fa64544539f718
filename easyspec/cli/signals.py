"""Ctrl-C, SIGTERM and a closed terminal as cancellation, so that `finally` cleans up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def handled_signals(handler: Callable[[int, Any], object], numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Have signals handled so within the block, and as before after it."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def run_until_signal(work: Coroutine[Any, Any, None]) -> int:
    """Run to the end, or until SIGINT, SIGTERM or SIGHUP cancels it; returns 0, or 128 + the signal's number.

    SIGHUP stays ignored where it is (nohup). Further signals are ignored: stopping is under way and bounded.
    """
    received: list[signal.Signals] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)

        def stop(number: signal.Signals) -> None:
            if not received:
                received.append(number)
                task.cancel()

        is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number in (signal.SIGINT, signal.SIGTERM, *(() if is_ignored else (signal.SIGHUP,))):
            loop.add_signal_handler(number, stop, number)
        try:
            await task
        except asyncio.CancelledError:
            if not received:
                raise

    asyncio.run(main())
    return 128 + received[0] if received else 0
