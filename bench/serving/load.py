"""Load: a number of requests at a time, or per second, for some time."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from bench.harness.clients import GatewayClient, kv_use
from bench.harness.streams import Outcome, Speculation, Stream
from bench.serving.workload import Workload

_Ask = Callable[[], Coroutine[Any, Any, Stream]]
_KV_PROBE_INTERVAL_S = 0.25
# A refused client of a closed loop comes again after this, not at once.
_MIN_PAUSE_AFTER_REFUSAL_S = 0.2
_RAMP_POLL_S = 0.02


@dataclass(frozen=True)
class WindowSettings:
    """How a stretch of load is timed: at first until every place has its first token, but no longer than
    `max_ramp_s`, which is not measured; then `window_s` seconds, which are. `rate` None is a closed loop of
    `concurrency` clients, otherwise `rate` requests per second arrive (Poisson), at most `concurrency` at a time."""

    concurrency: int
    window_s: float
    max_ramp_s: float
    rate: float | None = None


@dataclass
class Window:
    """What a stretch of load brought; `start_s` to `end_s` is what counts."""

    speculation: Speculation
    start_s: float = 0.0
    end_s: float = 0.0
    streams: list[Stream] = field(default_factory=list)
    kv_uses: list[float] = field(default_factory=list)
    num_skipped: int = 0


class LoadGenerator:
    """Runs windows of a workload against one gateway."""

    def __init__(self, client: GatewayClient, verifier: str | None, workload: Workload) -> None:
        """`verifier` is the address that is asked how full its KV pool is."""
        self._client = client
        self._verifier = verifier
        self._workload = workload

    async def run(
        self,
        settings: WindowSettings,
        speculation: Speculation,
        first_index: int,
        together: asyncio.Barrier | None = None,
    ) -> Window:
        """One window of the tasks from `first_index` on; every request is over when it returns. Windows that are to be
        measured at the same time share a barrier, and begin and end `together`."""
        window = Window(speculation)
        indices = itertools.count(first_index)

        async def ask() -> Stream:
            index = next(indices)
            stream = Stream(self._workload.task(index, speculation), index)
            window.streams.append(stream)
            await self._client.run(stream)
            return stream

        feed = self._poisson(settings, window, ask) if settings.rate else self._closed_loop(settings.concurrency, ask)
        load = asyncio.ensure_future(feed)
        watching = asyncio.ensure_future(self._watch_kv(window))
        try:
            await _ramp(window, settings)
            if together is not None:
                await together.wait()
            window.start_s = time.perf_counter()
            await asyncio.sleep(settings.window_s)
            window.end_s = time.perf_counter()
            if together is not None:
                await together.wait()
        finally:
            for task in (load, watching):
                task.cancel()
            await asyncio.gather(load, watching, return_exceptions=True)
        return window

    async def _closed_loop(self, concurrency: int, ask: _Ask) -> None:
        async def worker() -> None:
            while True:
                stream = await ask()
                if stream.outcome is not Outcome.COMPLETE:
                    await asyncio.sleep(max(_MIN_PAUSE_AFTER_REFUSAL_S, stream.retry_after_s or 0.0))

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(worker())

    async def _poisson(self, settings: WindowSettings, window: Window, ask: _Ask) -> None:
        assert settings.rate is not None
        chooser = random.Random(0)
        running: set[asyncio.Task[Stream]] = set()
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(chooser.expovariate(settings.rate))
                running = {task for task in running if not task.done()}
                if len(running) >= settings.concurrency:
                    window.num_skipped += 1
                    continue
                running.add(group.create_task(ask()))

    async def _watch_kv(self, window: Window) -> None:
        while self._verifier and (use := await kv_use(self._verifier)) is not None:
            if window.start_s:
                window.kv_uses.append(use)
            await asyncio.sleep(_KV_PROBE_INTERVAL_S)


async def _ramp(window: Window, settings: WindowSettings) -> None:
    """Wait until the load is what it is meant to be."""
    deadline_s = time.perf_counter() + settings.max_ramp_s
    wanted = settings.concurrency if settings.rate is None else 1
    while time.perf_counter() < deadline_s:
        if sum(1 for stream in window.streams if stream.rounds) >= wanted:
            return
        await asyncio.sleep(_RAMP_POLL_S)
