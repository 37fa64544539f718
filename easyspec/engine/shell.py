"""The event loop's side of an engine: starts and ends its device thread, and hands tasks over."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from easyspec.engine.device_thread import Core, DeviceThread, Task
from easyspec.free_memory import return_free_memory
from easyspec.parallel.launch import group_size
from easyspec.speculation.messages import KvUsage


@dataclass(eq=False)
class CloseTask(Task[None]):
    """Free a session's memory."""

    session_id: int


class SessionCore(Core, Protocol):
    """A core whose sessions hold KV memory."""

    def usage(self) -> KvUsage:
        """KV memory as it is now; may be read from another thread."""


CoreT = TypeVar("CoreT", bound=SessionCore)


class EngineShell(abc.ABC, Generic[CoreT]):
    """An engine whose core is built and steps on a thread of its own."""

    def __init__(self, thread_name: str, least_step_bound_s: float) -> None:
        self._thread = DeviceThread(thread_name, least_step_bound_s, is_group=group_size() > 1)
        self._built: CoreT | None = None

    async def start(self) -> None:
        await self._thread.start(self._build_core)

    async def stop(self) -> None:
        """End after the step in progress; waiting requests fail as unavailable."""
        await self._thread.stop()

    async def wait_lost(self) -> None:
        await self._thread.wait_lost()

    def kv_usage(self) -> KvUsage:
        assert self._built is not None, "started"
        return self._built.usage()

    def close(self, session_id: int) -> None:
        """Free a session; idempotent, returns at once."""
        self._thread.post(CloseTask(session_id))

    def _build_core(self) -> CoreT:
        self._built = core = self._build()
        return_free_memory()
        return core

    @abc.abstractmethod
    def _build(self) -> CoreT:
        """Build the core; called on the device thread."""
