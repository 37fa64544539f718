"""A session lives as long as the stream that opened it, and no longer than its client has something to say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Generic, Self, TypeVar

from easyspec.errors import UnavailableError

_MessageT = TypeVar("_MessageT")


class TimelyMessages(Generic[_MessageT]):
    """The messages of a session's client, each of which must come within `idle_timeout_s` seconds of being awaited.

    Raises UnavailableError where one does not: a client that says nothing holds memory that others need, and one that
    is merely slow can open the session again with the tokens it has.
    """

    def __init__(self, messages: AsyncIterator[_MessageT], idle_timeout_s: float) -> None:
        self._messages = aiter(messages)
        self._idle_timeout_s = idle_timeout_s

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> _MessageT:
        try:
            async with asyncio.timeout(self._idle_timeout_s):
                return await anext(self._messages)
        except TimeoutError:
            message = f"the session was ended: its client sent nothing for {self._idle_timeout_s:g} s"
            raise UnavailableError(message) from None


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
