"""Async services for tests that block: they live in the event loop of a thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import TypeVar

_EnteredT = TypeVar("_EnteredT")


@contextmanager
def in_thread(
    make: Callable[[], AbstractAsyncContextManager[_EnteredT]], start_timeout_s: float = 110.0
) -> Iterator[_EnteredT]:
    """Enter `make()` in another thread's event loop, yield what it yields, and exit it there."""
    entered: Future[_EnteredT] = Future()
    loop = asyncio.new_event_loop()
    stopping = asyncio.Event()

    async def serve() -> None:
        try:
            async with make() as value:
                entered.set_result(value)
                await stopping.wait()
        except BaseException as error:
            if entered.done():
                raise
            entered.set_exception(error)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        yield entered.result(start_timeout_s)
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join()
        loop.close()
