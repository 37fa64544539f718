"""Several choices of one prompt, decoded at the same time and streamed as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

from easyspec.speculation.parameters import MAX_SEED

_ItemT = TypeVar("_ItemT")


def choice_seed(seed: int, index: int) -> int:
    """The seed of choice `index` of a request with `seed`: itself for the first, well-mixed others for the rest.

    SplitMix64: neighbouring seeds and neighbouring choices have nothing in common.
    """
    if index == 0:
        return seed
    mixed = (seed + index * 0x9E3779B97F4A7C15) & MAX_SEED
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MAX_SEED
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MAX_SEED
    return mixed ^ (mixed >> 31)


async def merged(sources: Sequence[AsyncGenerator[_ItemT, None]]) -> AsyncGenerator[tuple[int, _ItemT], None]:
    """Yield (index of the source, item) as items come; each source is iterated and closed in a task of its own.

    The first exception of a source ends all of them and is raised. Closing this generator closes the sources before
    it returns. A source is at most one item ahead of the reader.
    """
    if len(sources) == 1:
        async with contextlib.aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    # One place: a source that is ahead of the reader waits, as it does with a single choice.
    queue: asyncio.Queue[tuple[int, _ItemT] | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int, source: AsyncGenerator[_ItemT, None]) -> None:
        async with contextlib.aclosing(source) as items:
            async for item in items:
                await queue.put((index, item))

    async def signal_end() -> None:
        await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
        await queue.put(None)

    pumps = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    ended = asyncio.create_task(signal_end())
    try:
        while (tagged := await queue.get()) is not None:
            yield tagged
        for task in pumps:
            if task.done():
                task.result()
    finally:
        # A generator must be closed in the task that runs it: cancel the tasks, and wait until each has closed its own.
        for task in (*pumps, ended):
            task.cancel()
        await asyncio.gather(*pumps, ended, return_exceptions=True)
