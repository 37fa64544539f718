"""`easyspec chaos`: mixed load on a stack in which things fail; every answer is compared with the undisturbed one."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.chaos.answers import Answer, Verdict
from bench.chaos.clients import Held, Kind, ask, gateway_at, kinds, undisturbed
from bench.chaos.faults import Injector
from bench.chaos.limits import footprint
from bench.chaos.stack import ChaosStack
from bench.provenance import provenance
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT
from easyspec.cli.signals import run_until_signal

MAX_STALL_S = 35.0
_SETTLE_S = 30.0
NOTHING = Held(num_sessions=0, num_slots=0)
_REFUSED_PAUSE_S = 0.5


@dataclass
class Report:
    """What was done, and what clients saw of it. `leftovers` are sessions and slots that no request holds any more;
    `memory_mib` is each process's own before and after, as far as it is the same process.
    """

    seed: int
    duration_s: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
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

    def as_json(self) -> dict[str, Any]:
        leftovers = {name: held and asdict(held) for name, held in self.leftovers.items()}
        return {
            **self.__dict__,
            "leftovers": leftovers,
            "num_faults": sum(self.faults.values()),
            "failures": self.failures,
        }


def main(argv: list[str]) -> int:
    """Run it; 0 if everything held, 1 if not, 128 + a signal's number if interrupted."""
    arguments = _parser().parse_args(argv)
    seed = arguments.seed if arguments.seed is not None else random.randrange(2**32)
    print(f"seed {seed}", file=sys.stderr, flush=True)
    reports: list[Report] = []

    async def run() -> None:
        reports.append(await run_chaos(arguments, seed))

    interrupted = run_until_signal(run())
    if interrupted:
        return interrupted
    report = {
        "command": shlex.join(["easyspec", "chaos", *argv]),
        **provenance((arguments.base, arguments.draft)),
        **reports[0].as_json(),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(f"{text}\n", encoding="utf-8")
    return 1 if reports[0].failures else 0


async def run_chaos(arguments: argparse.Namespace, seed: int) -> Report:
    """Start the stack, learn the answers, inject faults under load until they are all done or the time is up."""
    report = Report(seed)
    wanted = kinds(arguments.tokens)
    with contextlib.ExitStack() as folders:
        logs = arguments.logs or Path(folders.enter_context(tempfile.TemporaryDirectory()))
        logs.mkdir(parents=True, exist_ok=True)
        stack = ChaosStack(arguments.base, arguments.draft, ("--num-threads", "1"), logs)
        return await _run_on(stack, arguments, report, wanted)


async def _run_on(stack: ChaosStack, arguments: argparse.Namespace, report: Report, wanted: list[Kind]) -> Report:
    seed = report.seed
    async with stack, gateway_at(stack.address) as stub:
        whole = await undisturbed(stub, wanted)
        before, started_s = _memory_mib(stack), time.monotonic()
        injector = Injector(stack, arguments.faults, arguments.pause_s, seed)
        injecting = asyncio.create_task(injector.run())
        clients = [
            asyncio.create_task(_client(stub, wanted, whole, report, injecting, f"{seed}-{number}"))
            for number in range(arguments.clients)
        ]
        await asyncio.wait((injecting,), timeout=arguments.seconds)
        injecting.cancel()
        await asyncio.gather(injecting, return_exceptions=True)
        await asyncio.gather(*clients)
        report.faults, report.duration_s = dict(injector.counts), time.monotonic() - started_s
        report.leftovers = await leftovers(stack)
        after = _memory_mib(stack)
        report.memory_mib = {
            name: (before[pid, name], mib) for (pid, name), mib in after.items() if (pid, name) in before
        }
    return report


async def _client(
    stub: Any,
    wanted: list[Kind],
    whole: Mapping[str, Answer],
    report: Report,
    injecting: asyncio.Task[None],
    name: str,
) -> None:
    """Ask for one thing after the other until there are no more faults."""
    choose = random.Random(name)
    for number in itertools.count():
        if injecting.done():
            return
        kind = choose.choice(wanted)
        request_id = f"{name}-{number}"
        answer = await ask(stub, kind, request_id)
        report.add(kind, answer, answer.compared_with(whole[kind.name]), request_id)
        if answer.error is not None:
            await asyncio.sleep(_REFUSED_PAUSE_S)


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
    """Memory by process id and name."""
    found = {(process.pid, name): footprint(process.pid) for name, process in stack.processes.items()}
    return {key: each.memory_mib for key, each in found.items() if each is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyspec chaos", description=__doc__)
    parser.add_argument("--base", type=Path, default=DEFAULT_BASE, help="checkpoint folder of the verifiers")
    parser.add_argument("--draft", type=Path, default=DEFAULT_DRAFT, help="checkpoint folder of the drafters")
    parser.add_argument("--faults", type=int, default=100, help="faults to inject (default 100)")
    parser.add_argument("--seconds", type=float, default=600.0, help="inject none after this time (default 600)")
    parser.add_argument("--pause-s", type=float, default=1.0, help="mean pause between two faults (default 1)")
    parser.add_argument("--clients", type=int, default=6, help="requests at the same time (default 6)")
    parser.add_argument("--tokens", type=int, default=120, help="longest answers (default 120 tokens)")
    parser.add_argument("--logs", type=Path, default=None, help="folder for what the services log; else it is dropped")
    parser.add_argument("--json", type=Path, default=None, help="file for the report, which is printed too")
    parser.add_argument("--seed", type=int, default=None, help="of faults and load; drawn and printed if not given")
    return parser
