"""A step that hangs: the device does not answer, and nothing in this process can make it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import structlog

from easyspec.parallel.launch import EXIT_HUNG
from easyspec.usual_time import LEAST_BOUND_S, UsualTime

# For the ordinary way out, on which health says NOT_SERVING and clients learn that the process is going.
_EXIT_GRACE_S = 2.0
# Shorter steps found nothing to do, which says nothing about steps with work.
_LEAST_LEARNT_S = 0.001


class DeviceWatchdog:
    """Watches the steps of one thread from another one, and ends the process (EXIT_HUNG) if one does not end.

    `on_hang(reason)` is called before. Time in which the whole process stands still does not count.
    """

    def __init__(
        self,
        on_hang: Callable[[str], None],
        least_bound_s: float = LEAST_BOUND_S,
        tick_s: float = 1.0,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._on_hang = on_hang
        self._usual = UsualTime(least_bound_s)
        self._tick_s = tick_s
        self._end_process = end_process
        self._stopped = threading.Event()
        self._num_begun = 0
        self._is_stepping = False
        threading.Thread(target=self._watch, name="device-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        self._num_begun += 1
        self._is_stepping = True
        started_s = time.monotonic()
        try:
            yield
        finally:
            self._is_stepping = False
            duration_s = time.monotonic() - started_s
            if duration_s > _LEAST_LEARNT_S:
                self._usual.learn(duration_s)

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        num_begun, num_ticks = 0, 0
        while not self._stopped.wait(self._tick_s):
            is_same = self._is_stepping and self._num_begun == num_begun
            num_begun, num_ticks = self._num_begun, num_ticks + 1 if is_same else 0
            bound_s = self._usual.bound_s
            if num_ticks * self._tick_s > bound_s:
                reason = f"a step takes longer than {bound_s:.3g} s"
                structlog.get_logger().error("engine_hung", reason=reason)
                self._on_hang(reason)
                time.sleep(_EXIT_GRACE_S)
                self._end_process(EXIT_HUNG)
                return
