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
    KILL = "SIGKILL"
    STOP = "SIGSTOP"
    CUT = "connections cut"
    STALL = "connections stalled"
    DELAY = "connections delayed"
    MEMORY = "memory full"
    DISK = "disk full"


async def inject_faults(stack: ChaosStack, num_faults: int, pause_s: float, seed: int, counts: Counter[str]) -> None:
    """Inject so many, `pause_s` seconds apart on average, each as soon as there is a healthy victim; return when the
    last is over. `counts` grows by what is done to which role."""
    choose = random.Random(seed)
    async with asyncio.TaskGroup() as under_way:
        for _ in range(num_faults):
            await asyncio.sleep(choose.uniform(0, 2 * pause_s))
            kind = choose.choice([*FaultKind])
            seconds, degree = choose.uniform(0.2, _LONGEST_S), choose.random()
            victim = await _victim(stack, choose)
            counts[f"{kind.value} of a {victim.role}"] += 1
            under_way.create_task(_inject(victim, kind, seconds, degree))


async def _victim(stack: ChaosStack, choose: random.Random) -> Replica:
    while True:
        healthy = [each for each in stack.replicas if await stack.is_healthy(each)]
        verifiers = [each for each in healthy if each.role == VERIFIER]
        if allowed := [each for each in healthy if each.role != VERIFIER or len(verifiers) > 1]:
            return choose.choice(allowed)
        await asyncio.sleep(_POLL_S)


async def _inject(victim: Replica, kind: FaultKind, seconds: float, degree: float) -> None:
    """Do it for `seconds`; `degree`, 0 to 1, is how bad a delay or a limit is."""
    victim.num_faults += 1
    try:
        has_ended = contextlib.suppress(ProcessLookupError, FileNotFoundError, KeyError)
        with has_ended, contextlib.ExitStack() as ends:
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
