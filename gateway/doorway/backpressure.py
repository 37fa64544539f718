"""Readers that stop reading: what a request holds is freed in time, whatever becomes of its connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TypeVar

import structlog

from easyspec.errors import DeadlineError

_T = TypeVar("_T")
_log = structlog.get_logger()


async def ended_when_unread(items: AsyncGenerator[_T, None], timeout_s: float) -> AsyncGenerator[_T, None]:
    """Pass `items` on one by one, none before the one before was taken: nothing is buffered here.

    If the consumer does not come back for the next one within `timeout_s` seconds (its client does not read, and the
    connection takes no more), `items` is closed, which frees what it holds; a consumer that comes back later gets
    DeadlineError.
    """
    loop = asyncio.get_running_loop()
    closing: list[asyncio.Task[None]] = []

    def give_up() -> None:
        _log.warning("client_stalled", timeout_s=timeout_s)
        closing.append(loop.create_task(items.aclose()))

    try:
        async for item in items:
            timer = loop.call_later(timeout_s, give_up)
            try:
                yield item
            finally:
                timer.cancel()
            if closing:
                raise DeadlineError(f"nothing was read for {timeout_s:g} s")
    finally:
        # A close under way must end before another may begin.
        await asyncio.gather(*closing)
        await items.aclose()
