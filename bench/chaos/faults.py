"""Faults, drawn from a seed, one after the other; a verifier is always left alone."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import random
import signal
from collections import Counter

from bench.chaos.limits import full_disk, full_memory
from bench.chaos.stack import ChaosStack, Replica
from easyspec.cli.processes import VERIFIER

_POLL_S = 0.1
_LONGEST_S = 8.0
_LONGEST_DELAY_S = 0.3
_MOST_SPARE_BYTES = 16 << 20


class FaultKind(enum.Enum):
    """What is done to one replica."""

    KILL = "SIGKILL"
    STOP = "SIGSTOP"
    CUT = "connections cut"
    STALL = "connections stalled"
    DELAY = "connections delayed"
    MEMORY = "memory full"
    DISK = "disk full"


class Injector:
    """Injects `num_faults`, `pause_s` seconds apart on average, and waits for a healthy victim where there is none."""

    def __init__(self, stack: ChaosStack, num_faults: int, pause_s: float, seed: int) -> None:
        self._stack = stack
        self._num_faults = num_faults
        self._pause_s = pause_s
        self._random = random.Random(seed)
        self._under_way: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    async def run(self) -> None:
        """Return when the last fault is over."""
        try:
            for _ in range(self._num_faults):
                await asyncio.sleep(self._random.uniform(0, 2 * self._pause_s))
                kind = self._random.choice([*FaultKind])
                seconds, degree = self._random.uniform(0.2, _LONGEST_S), self._random.random()
                victim = await self._victim()
                self.counts[f"{kind.value} of a {victim.role}"] += 1
                task = asyncio.create_task(_inject(victim, kind, seconds, degree))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
            await asyncio.gather(*self._under_way)
        finally:
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _victim(self) -> Replica:
        while True:
            replicas = self._stack.replicas
            healthy = [each for each in replicas if await self._stack.is_healthy(each)]
            verifiers = [each for each in healthy if each.role == VERIFIER]
            allowed = [each for each in healthy if each.role != VERIFIER or len(verifiers) > 1]
            if allowed:
                return self._random.choice(allowed)
            await asyncio.sleep(_POLL_S)


async def _inject(victim: Replica, kind: FaultKind, seconds: float, degree: float) -> None:
    """Do it for `seconds`; `degree`, 0 to 1, is how bad a delay or a limit is."""
    victim.num_faults += 1
    try:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError), contextlib.ExitStack() as ends:  # it has ended
            if kind is FaultKind.KILL:
                victim.send(signal.SIGKILL)
            elif kind is FaultKind.CUT:
                victim.proxy.cut()
            elif kind is FaultKind.STALL:
                await victim.proxy.stall(seconds)
            elif kind is FaultKind.DELAY:
                await victim.proxy.delay(seconds, degree * _LONGEST_DELAY_S)
            else:
                if kind is FaultKind.MEMORY:
                    ends.enter_context(full_memory(victim.process.pid, int(degree * _MOST_SPARE_BYTES)))
                elif kind is FaultKind.DISK:
                    ends.enter_context(full_disk(victim.process.pid))
                else:
                    victim.send(signal.SIGSTOP)
                    ends.callback(victim.send, signal.SIGCONT)
                await asyncio.sleep(seconds)
    finally:
        victim.num_faults -= 1
