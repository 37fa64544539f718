"""How many requests run at a time; the others wait a little, or are told to come again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from easyspec.errors import CapacityError


class Admission:
    """At most `max_running` requests run; at most `max_waiting` wait, each for at most `wait_timeout_s` seconds."""

    def __init__(self, max_running: int, max_waiting: int, wait_timeout_s: float) -> None:
        self._places = asyncio.Semaphore(max_running)
        self._max_waiting = max_waiting
        self._wait_timeout_s = wait_timeout_s
        self.num_running = 0
        self.num_waiting = 0

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Hold a place; CapacityError if none comes free in time."""
        await self._wait()
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
            self._places.release()

    async def _wait(self) -> None:
        if self._places.locked() and self.num_waiting >= self._max_waiting:
            raise CapacityError(
                f"{self.num_running} requests are running and {self.num_waiting} waiting", self._wait_timeout_s
            )
        self.num_waiting += 1
        try:
            async with asyncio.timeout(self._wait_timeout_s):
                await self._places.acquire()
        except TimeoutError:
            message = f"no request ended within {self._wait_timeout_s:g} s"
            raise CapacityError(message, self._wait_timeout_s) from None
        finally:
            self.num_waiting -= 1
