from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from easyspec.errors import UnavailableError
from easyspec.rpc.sessions import TimelyMessages, open_session


async def opened(session_id: int) -> int:
    return session_id


async def test_closes_once_however_the_block_ends() -> None:
    closed: list[int] = []
    async with open_session(opened(1), closed.append) as session_id:
        assert (session_id, closed) == (1, [])
    with pytest.raises(KeyError):
        async with open_session(opened(2), closed.append):
            raise KeyError
    assert closed == [1, 2]


async def test_an_opening_abandoned_half_way_is_cancelled() -> None:
    closed: list[int] = []
    was_cancelled = False

    async def opened_never() -> int:
        nonlocal was_cancelled
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled = True
            raise
        return 3

    async def use() -> None:
        async with open_session(opened_never(), closed.append):
            raise AssertionError("never reached")

    task = asyncio.create_task(use())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert was_cancelled
    assert closed == []


async def test_a_failed_opening_closes_nothing() -> None:
    closed: list[int] = []

    async def failing() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        async with open_session(failing(), closed.append):
            raise AssertionError("never reached")
    assert closed == []


async def said(*messages: str, pause_s: float = 0.0) -> AsyncIterator[str]:
    for message in messages:
        await asyncio.sleep(pause_s)
        yield message


async def test_messages_that_come_in_time_pass_however_long_they_are_thought_about() -> None:
    seen = []
    async for message in TimelyMessages(said("a", "b", "c"), idle_timeout_s=0.05):
        seen.append(message)
        await asyncio.sleep(0.1)  # the service's own time is not the client's silence
    assert seen == ["a", "b", "c"]


async def test_silence_ends_the_session_as_unavailable() -> None:
    messages = TimelyMessages(said("a", "b", pause_s=0.1), idle_timeout_s=0.02)
    with pytest.raises(UnavailableError, match=r"sent nothing for 0\.02 s"):
        await anext(messages)
