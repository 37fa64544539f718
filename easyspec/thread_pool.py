"""Pools of threads that are all there from the beginning."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

_START_S = 60.0


def started_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads are running, where Python's own starts the last of them in some busy moment of a later
    day: what a process has does not grow with its age."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
    # Not for ever: where a thread cannot be started the others must end.
    meeting = threading.Barrier(num_threads, timeout=_START_S)
    for started in [pool.submit(meeting.wait) for _ in range(num_threads)]:
        started.result()
    return pool
