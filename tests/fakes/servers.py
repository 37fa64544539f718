"""Real gRPC servers on free ports, for tests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from easyspec.rpc.application import Application
from easyspec.rpc.lifecycle import RpcServer


@asynccontextmanager
async def serving(application: Application, drain_grace_s: float = 0.0) -> AsyncIterator[str]:
    """Serve `application`; yields its address."""
    server = RpcServer(application, "127.0.0.1:0")
    port = await server.listen()
    try:
        await server.start()
        yield f"127.0.0.1:{port}"
    finally:
        await server.drain(drain_grace_s)


async def eventually(condition: Callable[[], bool], within_s: float = 10.0) -> None:
    """Fail unless `condition` becomes true in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.002)


class LentEngine:
    """A started engine that may be served as often as one likes: the lender starts and stops it."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
