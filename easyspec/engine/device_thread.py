"""One thread that owns the device: it takes everything that is ready and steps over the batch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import structlog

from easyspec.engine.device_faults import is_out_of_memory, is_sticky
from easyspec.engine.device_watchdog import DeviceWatchdog
from easyspec.errors import CapacityError, EngineLostError, UnavailableError
from easyspec.usual_time import LEAST_BOUND_S

ResultT = TypeVar("ResultT")

_LONGEST_WAIT_S = 1.0


@dataclass(eq=False)
class Task(Generic[ResultT]):
    """Something asked of the device; its future is resolved on the device thread."""

    future: Future[ResultT] = field(default_factory=Future, init=False)
    arrived_ns: int = field(default_factory=time.monotonic_ns, init=False)

    def finish(self, result: ResultT) -> bool:
        """Answer; False if the asker has gone."""
        is_awaited = self.future.set_running_or_notify_cancel()
        if is_awaited:
            self.future.set_result(result)
        return is_awaited

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless the asker has gone."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Core(Protocol):
    """What runs on the device thread. Only `step` computes; errors of one task are given to that task."""

    def accept(self, task: Any, /) -> None:
        """Take a task up; quick."""

    def step(self) -> bool:
        """Compute one batch of what is ready; True if more is.

        Else it is called again when a task comes, and every second in between, for what depends on the clock.
        """

    def abandon(self, error: BaseException) -> None:
        """A bug broke `step`: fail every task that is waiting, so that no caller hangs."""


class DeviceThread:
    """Runs a core on its own thread; the event loop submits tasks and awaits their futures.

    `when_idle` is called about every second in which nothing is asked, `when_stopped` at the end; both on the thread,
    and set before there are tasks. `patience_s` says how many seconds the next step should wait for tasks that are
    about to come. EngineLostError from a step or from one of these ends the thread, and the engine is lost; so do
    errors after which the device is of no use, and, with `is_group`, any other one: followers wait in mid-pass then.
    A step that takes longer than `least_step_bound_s` and 20 times the usual ends the process.
    """

    def __init__(
        self,
        name: str,
        least_step_bound_s: float = LEAST_BOUND_S,
        is_group: bool = False,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._inbox: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._name = name
        self._is_stopped = False
        self._lost: Future[None] = Future()
        self._least_step_bound_s = least_step_bound_s
        self._is_group = is_group
        self._end_process = end_process
        self._is_hung = False
        self.patience_s: Callable[[], float] = lambda: 0.0
        self.when_idle: Callable[[], None] = lambda: None
        self.when_stopped: Callable[[], None] = lambda: None

    async def start(self, build: Callable[[], Core]) -> None:
        """Build the core on the thread, which may take long, and begin to step; raises what `build` raises."""
        built: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, built), name=self._name, daemon=True)
        self._thread.start()
        await asyncio.wrap_future(built)

    async def stop(self) -> None:
        """End after the step in progress; tasks still waiting fail with UnavailableError. Idempotent."""
        self._is_stopped = True
        self._inbox.put(None)
        if self._thread is not None and not self._is_hung:
            await asyncio.to_thread(self._thread.join)

    async def wait_lost(self) -> None:
        """Return when the device or another rank is lost; never, if none is."""
        await asyncio.shield(asyncio.wrap_future(self._lost))

    def submit(self, task: Task[ResultT]) -> asyncio.Future[ResultT]:
        """Queue a task; its result or error arrives in the returned future of the running loop."""
        if self._is_stopped:
            task.fail(UnavailableError("the engine has stopped"))
        else:
            self._inbox.put(task)
        return asyncio.wrap_future(task.future)

    async def submit_opening(self, task: Task[int], close: Callable[[int], None]) -> int:
        """The id of the session that `task` opens. If the caller stops waiting, the task is withdrawn, and a session
        that was opened all the same is closed: its id is known nowhere else.
        """
        try:
            return await self.submit(task)
        except asyncio.CancelledError:
            task.future.cancel()  # in vain if the device thread has just answered

            def close_opened(future: Future[int]) -> None:
                if not future.cancelled() and future.exception() is None:
                    close(future.result())

            task.future.add_done_callback(close_opened)
            raise

    def post(self, task: Task[Any]) -> None:
        """Queue a task without waiting for it; needs no event loop."""
        self._inbox.put(task)

    def _run(self, build: Callable[[], Core], built: Future[None]) -> None:
        if not built.set_running_or_notify_cancel():  # from here on it cannot be cancelled
            return
        try:
            core = build()
        except BaseException as error:
            built.set_exception(error)
            return
        built.set_result(None)
        watchdog = DeviceWatchdog(self._hang, self._least_step_bound_s, end_process=self._end_process)
        try:
            self._work(core, watchdog)
            core.abandon(UnavailableError("the engine has stopped"))
            self.when_stopped()
        except EngineLostError as error:
            structlog.get_logger().error("engine_lost", thread=self._name, reason=str(error))
            self._is_stopped = True
            core.abandon(EngineLostError(str(error)))
            self._lost.set_result(None)
        finally:
            watchdog.stop()
        for task in self._take(wait=False):
            task.fail(UnavailableError("the engine has stopped"))

    def _hang(self, reason: str) -> None:
        self._is_hung = self._is_stopped = True
        self._lost.set_result(None)

    def _work(self, core: Core, watchdog: DeviceWatchdog) -> None:
        """Step until told to stop; raises EngineLostError."""
        is_busy = False
        while not self._is_stopped:
            tasks = self._take(wait=not is_busy)
            for task in tasks:
                self._accept(core, task)
            self._linger(core)
            try:
                with watchdog.step():
                    if not tasks and not is_busy:
                        self.when_idle()
                    is_busy = core.step()
            except EngineLostError:
                raise
            except Exception as error:
                structlog.get_logger().exception("engine_step_failed", thread=self._name)
                if self._is_group or is_sticky(error):
                    raise EngineLostError(f"a step failed beyond repair ({type(error).__name__})") from error
                core.abandon(_for_askers(error))
                is_busy = False

    def _linger(self, core: Core) -> None:
        """Take up what comes while a step had better wait for it."""
        while not self._is_stopped and (patience_s := self.patience_s()) > 0.0:
            for task in self._take(wait=True, timeout_s=patience_s):
                self._accept(core, task)

    def _accept(self, core: Core, task: Task[Any]) -> None:
        """Hand a task over; a bug that it meets is its own answer, and the thread lives on."""
        try:
            core.accept(task)
        except Exception as error:
            structlog.get_logger().exception("engine_task_failed", thread=self._name)
            task.fail(_for_askers(error))

    def _take(self, *, wait: bool, timeout_s: float = _LONGEST_WAIT_S) -> list[Task[Any]]:
        """Everything in the inbox; waits for the first, but not for ever, if told to."""
        tasks: list[Task[Any]] = []
        with contextlib.suppress(queue.Empty):
            task = self._inbox.get(block=wait, timeout=timeout_s)
            while True:
                if task is not None:
                    tasks.append(task)
                task = self._inbox.get_nowait()
        return tasks


def _for_askers(error: Exception) -> Exception:
    """What callers see of an error: full memory is not a bug, and passes."""
    return CapacityError("memory is full") if is_out_of_memory(error) else error
