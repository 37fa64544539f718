"""A session lives as long as the stream that opened it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def open_session(opening: Awaitable[int], close: Callable[[int], None]) -> AsyncIterator[int]:
    """Await `opening` for a session id; `close` it when the block ends, however it ends.

    If the caller goes away while `opening` is under way, the session is closed as soon as it is open: nobody else
    would ever know its id.
    """
    task = asyncio.ensure_future(opening)

    def close_abandoned(finished: asyncio.Future[int]) -> None:
        if not finished.cancelled() and finished.exception() is None:
            close(finished.result())

    try:
        session_id = await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(close_abandoned)
        raise
    try:
        yield session_id
    finally:
        close(session_id)
