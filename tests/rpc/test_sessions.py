from __future__ import annotations

import asyncio

import pytest

from easyspec.rpc.sessions import open_session


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
