from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from easyspec.cli.event_loop import EventLoopThread


async def _interrupted_at_once(ended: threading.Event, number: int) -> None:
    """Sends the signal from the loop's thread, while the main thread is about to wait."""
    try:
        os.kill(os.getpid(), number)
        await asyncio.sleep(30)
    finally:
        ended.set()


def test_results_and_exceptions_come_back() -> None:
    async def add(a: int, b: int) -> int:
        await asyncio.sleep(0)
        return a + b

    async def fail() -> None:
        raise ValueError("no")

    with EventLoopThread() as loop:
        assert loop.run(add(1, 2)) == 3
        with pytest.raises(ValueError, match="no"):
            loop.run(fail())


@pytest.mark.parametrize("attempt", range(20))
def test_ctrl_c_never_leaves_the_work_running(attempt: int) -> None:
    ended = threading.Event()
    with EventLoopThread() as loop:
        with pytest.raises(KeyboardInterrupt):
            loop.run(_interrupted_at_once(ended, signal.SIGINT))
        assert ended.is_set()
        assert loop.run(asyncio.sleep(0, "still there")) == "still there"


def test_sigterm_cancels_and_ends_the_program() -> None:
    ended = threading.Event()
    with EventLoopThread() as loop, pytest.raises(SystemExit) as caught:
        loop.run(_interrupted_at_once(ended, signal.SIGTERM))
    assert caught.value.code == 128 + signal.SIGTERM
    assert ended.is_set()


def test_what_is_left_behind_is_cancelled_at_the_end() -> None:
    ended = threading.Event()

    async def leave_behind() -> asyncio.Task[None]:
        async def linger() -> None:
            try:
                await asyncio.sleep(30)
            finally:
                ended.set()

        task = asyncio.create_task(linger())
        await asyncio.sleep(0)
        return task

    with EventLoopThread() as loop:
        loop.run(leave_behind())
    assert ended.is_set()
