"""A session lives as long as the stream that opened it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def open_session(opening: Awaitable[int], close: Callable[[int], None]) -> AsyncIterator[int]:
    """Await `opening` for a session id; `close` it when the block ends, however it ends.

    If the caller goes away while `opening` is under way, it is cancelled, and must then leave nothing open.
    """
    session_id = await opening
    try:
        yield session_id
    finally:
        close(session_id)
