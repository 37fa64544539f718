"""Work in an event loop that Ctrl-C, SIGTERM or a closed terminal cancels, so that `finally` cleans up."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar

_T = TypeVar("_T")

END_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_POLL_S = 0.1


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


class EventLoopThread:
    """The process's one event loop in a thread, running from enter to exit, also while the main one reads a line.

    `run` is for the main thread. A signal cancels what it runs and awaits the cancellation; then Ctrl-C raises
    KeyboardInterrupt, SIGTERM and a closed terminal SystemExit.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="event-loop")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(_finish(self._loop), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        started: list[asyncio.Task[_T]] = []
        signals: list[int] = []
        ended = threading.Event()

        def start() -> None:
            started.append(self._loop.create_task(work))
            started[0].add_done_callback(lambda _: ended.set())
            if signals:
                cancel()

        def cancel() -> None:
            for task in started:
                task.cancel()

        def on_signal(number: int, _frame: object) -> None:
            signals.append(number)
            self._loop.call_soon_threadsafe(cancel)

        # Exceptions out of signal handlers could come between any two lines and leave the work running.
        with handled_signals(on_signal, (signal.SIGINT, *END_SIGNALS)):
            self._loop.call_soon_threadsafe(start)
            # A signal may reach any thread, and Python's handler waits until the main one has something to do.
            while not ended.wait(_POLL_S):
                pass
        end = next((number for number in signals if number in END_SIGNALS), None)
        if end is not None:
            raise SystemExit(128 + end)
        if signals and started[0].cancelled():
            raise KeyboardInterrupt
        return started[0].result()


async def _finish(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
