"""An event loop in a thread, for a command whose main thread waits for a person to type."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

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
        job = _Job(self._loop, work)
        # Exceptions out of signal handlers could come between any two lines and leave the job running.
        with handled_signals(job.cancel, (signal.SIGINT, *END_SIGNALS)):
            job.start()
            # A signal may reach any thread, and Python's handler waits until the main one has something to do.
            while not job.ended.wait(_POLL_S):
                pass
        end = next((number for number in job.signals if number in END_SIGNALS), None)
        if end is not None:
            raise SystemExit(128 + end)
        if job.signals and job.task.cancelled():
            raise KeyboardInterrupt
        return job.task.result()


class _Job(Generic[_T]):
    """Work in the loop's thread, as the main thread sees it; `task` is valid once `ended` is set."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T]) -> None:
        self._loop = loop
        self._work = work
        self._started: list[asyncio.Task[_T]] = []
        self.ended = threading.Event()
        self.signals: list[int] = []

    @property
    def task(self) -> asyncio.Task[_T]:
        return self._started[0]

    def start(self) -> None:
        self._loop.call_soon_threadsafe(self._start)

    def cancel(self, number: int, _frame: object) -> None:
        """A signal handler."""
        self.signals.append(number)
        self._loop.call_soon_threadsafe(self._cancel)

    def _start(self) -> None:
        task = self._loop.create_task(self._work)
        self._started.append(task)
        task.add_done_callback(lambda _: self.ended.set())
        if self.signals:
            task.cancel()

    def _cancel(self) -> None:
        for task in self._started:
            task.cancel()


async def _finish(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
