"""`easyspec chaos`: mixed load on a stack in which things fail; every answer is compared with the undisturbed one."""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from bench.chaos.answers import Answer, Verdict
from bench.chaos.clients import Held, Kind, answers, gateway_at, kinds, undisturbed
from bench.chaos.faults import inject_faults
from bench.chaos.limits import footprint
from bench.chaos.stack import ChaosStack
from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT

MAX_STALL_S = 35.0
_SETTLE_S = 30.0
NOTHING = Held(num_sessions=0, num_slots=0)
_REFUSED_PAUSE_S = 0.5


@dataclass(frozen=True)
class ChaosSettings:
    base: Annotated[Path, flag("Checkpoint folder of the verifiers.")] = DEFAULT_BASE
    draft: Annotated[Path, flag("Checkpoint folder of the drafters.")] = DEFAULT_DRAFT
    faults: Annotated[int, flag("Faults to inject.")] = 100
    seconds: Annotated[float, flag("Inject none after this time.")] = 600.0
    pause_s: Annotated[float, flag("Mean pause between two faults.")] = 1.0
    clients: Annotated[int, flag("Requests at the same time.", minimum=1)] = 6
    tokens: Annotated[int, flag("Longest answers.", minimum=1)] = 120
    logs: Annotated[Path | None, flag("Folder for what the services log [default: it is dropped].")] = None
    seed: Annotated[int | None, flag("Of faults and load [default: drawn, and printed].")] = None


@dataclass
class Report:
    """What was done, and what clients saw of it. `leftovers` are sessions and slots that no request holds any more;
    `memory_mib` is each process's own before and after, as far as it is the same process."""

    seed: int
    duration_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    improper_errors: list[str] = field(default_factory=list)
    bad_answers: list[str] = field(default_factory=list)
    longest_stall_s: float = 0.0
    longest_stall_of: str = ""
    leftovers: dict[str, Held | None] = field(default_factory=dict)
    memory_mib: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, kind: Kind, answer: Answer, verdict: Verdict, request_id: str) -> None:
        self.answers[verdict.value] += 1
        if answer.longest_pause_s > self.longest_stall_s:
            self.longest_stall_s, self.longest_stall_of = answer.longest_pause_s, f"{request_id} ({kind.name})"
        if verdict not in (Verdict.RIGHT, Verdict.CUT):
            self.bad_answers.append(f"{request_id} ({kind.name}): {verdict.value}")
        if verdict is Verdict.CUT and answer.error is None and kind.gives_up_after is None:
            self.bad_answers.append(f"{request_id} ({kind.name}): ended without a word")
        if answer.error is not None:
            self.errors[f"{type(answer.error).__name__}: {answer.error}"] += 1
            if not answer.is_refused_properly:
                self.improper_errors.append(f"{request_id} ({kind.name}): {answer.error}")

    @property
    def failures(self) -> list[str]:
        """Why the run did not go as it must; empty if it did."""
        found = [*self.bad_answers, *self.improper_errors]
        if self.longest_stall_s > MAX_STALL_S:
            found.append(f"a stream stood still for {self.longest_stall_s:.1f} s")
        found += [f"{name} does not answer" for name, held in self.leftovers.items() if held is None]
        found += [f"{name} holds {held}" for name, held in self.leftovers.items() if held not in (None, NOTHING)]
        return found


async def measure(settings: ChaosSettings, console: Console) -> Findings:
    """Start the stack, learn the answers, inject faults under load until they are all done or the time is up."""
    seed = settings.seed if settings.seed is not None else random.randrange(2**32)
    print(f"seed {seed}", file=sys.stderr, flush=True)
    report = Report(seed)
    with tempfile.TemporaryDirectory() as dropped:
        logs = settings.logs or Path(dropped)
        logs.mkdir(parents=True, exist_ok=True)
        stack = ChaosStack(settings.base, settings.draft, ("--num-threads", "1"), logs)
        async with stack, gateway_at(stack.address) as stub:
            await _run_on(stack, stub, settings, report)
    content = {**vars(report), "num_faults": sum(report.faults.values()), "failures": report.failures}
    return Findings(content, checkpoints=(settings.base, settings.draft), exit_code=1 if report.failures else 0)


async def _run_on(stack: ChaosStack, stub: Any, settings: ChaosSettings, report: Report) -> None:
    wanted = kinds(settings.tokens)
    whole = await undisturbed(stub, wanted)
    before, started_s = _memory_mib(stack), time.monotonic()
    injecting = asyncio.create_task(inject_faults(stack, settings.faults, settings.pause_s, report.seed, report.faults))

    async def client(name: str) -> None:
        async for asked in answers(lambda: nullcontext(stub), wanted, whole, name, is_over=injecting.done):
            report.add(*asked)
            if asked.answer.error is not None:
                await asyncio.sleep(_REFUSED_PAUSE_S)

    clients = [asyncio.create_task(client(f"{report.seed}-{number}")) for number in range(settings.clients)]
    await asyncio.wait((injecting,), timeout=settings.seconds)
    injecting.cancel()
    (outcome,) = await asyncio.gather(injecting, return_exceptions=True)
    await asyncio.gather(*clients)
    if isinstance(outcome, Exception):
        raise outcome
    report.duration_s = time.monotonic() - started_s
    report.leftovers = await leftovers(stack)
    after = _memory_mib(stack)
    report.memory_mib = {name: (before[pid, name], mib) for (pid, name), mib in after.items() if (pid, name) in before}


async def leftovers(stack: ChaosStack) -> dict[str, Held | None]:
    """What sessions hold once nothing runs, by replica; waits for replicas that are starting again."""
    deadline_s = time.monotonic() + _SETTLE_S
    while True:
        names = [f"{replica.role} {index}" for index, replica in enumerate(stack.replicas)]
        all_held = await asyncio.gather(*(replica.held() for replica in stack.replicas))
        if all(held == NOTHING for held in all_held) or time.monotonic() > deadline_s:
            return dict(zip(names, all_held, strict=True))
        await asyncio.sleep(1.0)


def _memory_mib(stack: ChaosStack) -> dict[tuple[int, str], float]:
    found = {(process.pid, name): footprint(process.pid) for name, process in stack.processes.items()}
    return {key: each.memory_mib for key, each in found.items() if each is not None}


BENCHMARK = Benchmark("easyspec chaos", __doc__, ChaosSettings, measure)
