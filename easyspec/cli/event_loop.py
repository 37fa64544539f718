"""An event loop in a thread, for a command whose main thread waits for a person to type."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from easyspec.cli.signals import END_SIGNALS, handled_signals

_T = TypeVar("_T")

_POLL_S = 0.1


class EventLoopThread:
    """The process's one event loop, running from enter to exit, also while the main thread reads a line.

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
