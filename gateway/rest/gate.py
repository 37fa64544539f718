"""Which requests may come in, and how many are inside: readiness and draining of the HTTP side."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from easyspec.errors import UnavailableError

_LOADING = "loading: try again later"
DRAINING = "draining: this replica is going away"
# A cancelled request frees what it holds at once; one that does not in this time is a bug, and no reason to hang.
_CANCEL_GRACE_S = 5.0


class Gate:
    """Refuses requests until `admit` and from `drain` on, with UnavailableError."""

    def __init__(self) -> None:
        self._refusal: str | None = _LOADING
        self._tasks: set[asyncio.Task[Any]] = set()

    def admit(self) -> None:
        self._refusal = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Around a request's work, in the task that does it; UnavailableError if it may not come in."""
        if self._refusal is not None:
            raise UnavailableError(self._refusal)
        task = asyncio.current_task()
        assert task is not None, "a request runs in a task"
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    async def drain(self, grace_s: float) -> bool:
        """Refuse new requests, cancel what outlives `grace_s` seconds; False if one ignores even that."""
        self._refusal = DRAINING
        await self._wait_empty(grace_s)
        for task in self._tasks:
            task.cancel()
        await self._wait_empty(_CANCEL_GRACE_S)
        return not self._tasks

    async def _wait_empty(self, timeout_s: float) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
