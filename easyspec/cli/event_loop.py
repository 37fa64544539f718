"""An event loop in a thread, for a command whose main thread waits for a person to type."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

_T = TypeVar("_T")


class EventLoopThread:
    """The process's one event loop, running from enter to exit, also while the main thread reads a line.

    `run` is for the main thread. Ctrl-C cancels what it runs, awaits the cancellation and raises KeyboardInterrupt.
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
        """Its result, or its exception. A signal handler's SystemExit is treated as Ctrl-C is."""
        task = asyncio.run_coroutine_threadsafe(_start(work), self._loop).result()
        ended = asyncio.run_coroutine_threadsafe(_ended(task), self._loop)
        interruption: BaseException | None = None
        while True:
            try:
                ended.result()
                break
            except (KeyboardInterrupt, SystemExit) as error:
                interruption = error
                self._loop.call_soon_threadsafe(task.cancel)
        if interruption is not None and (task.cancelled() or isinstance(interruption, SystemExit)):
            raise interruption
        return task.result()


async def _start(work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
    return asyncio.create_task(work)


async def _ended(task: asyncio.Task[_T]) -> None:
    await asyncio.wait([task])


async def _finish(loop: asyncio.AbstractEventLoop) -> None:
    tasks = asyncio.all_tasks(loop) - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
