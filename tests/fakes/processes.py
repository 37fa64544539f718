"""Which processes there are."""

from __future__ import annotations

import asyncio
import os
import select
import time
from dataclasses import dataclass
from pathlib import Path


def processes_with(argument: str) -> list[int]:
    """Ids of the processes that have `argument` in their command line, this one aside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if argument.encode() in command and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def assert_none_left_with(argument: str, within_s: float = 5.0) -> None:
    """Fail unless the last process with `argument` ends in time: the kernel kills orphans, but not at once."""
    deadline_s = time.monotonic() + within_s
    while left := processes_with(argument):
        assert time.monotonic() < deadline_s, f"processes {left} are left"
        time.sleep(0.05)


@dataclass(frozen=True)
class RankProcess:
    """A process that torchrun started; `handle` means this very process, also after its id was given to another."""

    rank: int
    pid: int
    handle: int

    async def ended_s(self, since_s: float, within_s: float) -> float:
        """Wait for its end; seconds from `since_s` (monotonic) until then. Raises TimeoutError. Closes the handle."""
        poll = select.poll()
        poll.register(self.handle, select.POLLIN)
        try:
            if not await asyncio.to_thread(poll.poll, within_s * 1000):
                raise TimeoutError(f"rank {self.rank} lives after {within_s:g} s")
        finally:
            os.close(self.handle)
        return time.monotonic() - since_s


def ranks_under(launcher_pid: int) -> list[RankProcess]:
    """The ranks that a torchrun process has started, by rank."""
    ranks = []
    for child in Path(f"/proc/{launcher_pid}/task/{launcher_pid}/children").read_text().split():
        for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                ranks.append(RankProcess(int(variable[5:]), int(child), os.pidfd_open(int(child))))
    return sorted(ranks, key=lambda rank: rank.rank)
