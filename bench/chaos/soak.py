"""`python -m bench soak`: clients that come, go and give up, for an hour; what the processes have must not grow.

Once a minute the clients rest, so that what is counted then is what was left over.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Console

from bench.chaos.answers import Verdict
from bench.chaos.chaos import NOTHING, leftovers
from bench.chaos.clients import answers, gateway_at, kinds, undisturbed
from bench.chaos.limits import Footprint, footprint
from bench.chaos.stack import ChaosStack
from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from easyspec.cli.processes import DEFAULT_BASE, DEFAULT_DRAFT

MOST_GROWTH = 0.02
_REST_S = 3.0


@dataclass(frozen=True)
class SoakSettings:
    base: Annotated[Path, flag("Checkpoint folder of the verifiers.")] = DEFAULT_BASE
    draft: Annotated[Path, flag("Checkpoint folder of the drafters.")] = DEFAULT_DRAFT
    seconds: Annotated[float, flag("How long.")] = 3600.0
    load_s: Annotated[float, flag("Seconds of load between two rests.")] = 57.0
    warm_up_rests: Annotated[int, flag("Rests at the beginning, which are not measured.")] = 10
    clients: Annotated[int, flag("Requests at the same time.", minimum=1)] = 8
    tokens: Annotated[int, flag("Longest answers.", minimum=1)] = 64
    kv_slots: Annotated[int, flag("Slots of each KV pool, which fill up.")] = 8192
    seed: Annotated[int | None, flag("Of the load [default: drawn].")] = None


@dataclass
class SoakReport:
    """Footprints of the processes at rest, by name, one after each of the `minutes`; answers by how they compare."""

    seed: int
    warm_up_rests: int
    answers: Counter[str] = field(default_factory=Counter)
    bad_answers: list[str] = field(default_factory=list)
    footprints: dict[str, list[Footprint]] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)

    def growth(self, name: str) -> float:
        """By what share a process's memory grew after the warm-up, from the first to the last third of the rests."""
        sizes = [each.memory_mib for each in self.footprints[name][self.warm_up_rests :]]
        third = max(1, len(sizes) // 3)
        return statistics.median(sizes[-third:]) / statistics.median(sizes[:third]) - 1.0

    @property
    def failures(self) -> list[str]:
        """What did not hold; empty if all did."""
        found = [*self.bad_answers, *self.left_over]
        for name, all_rests in self.footprints.items():
            rests = all_rests[self.warm_up_rests :]
            if len(rests) < 2:
                found.append(f"{name}: too few rests after the warm-up")
                continue
            if self.growth(name) > MOST_GROWTH:
                found.append(f"{name}: memory grew by {self.growth(name):.1%}")
            for what in ("num_descriptors", "num_threads"):
                counts = [getattr(rest, what) for rest in rests]
                third = max(1, len(counts) // 3)
                before, after = max(counts[:third]), statistics.median_low(counts[-third:])
                if after > before:  # a connection or a thread of gRPC's more comes and goes at any time
                    found.append(f"{name}: {what} grew from {before} to {after}")
        return found


async def measure(settings: SoakSettings, console: Console) -> Findings:
    """Load and rests in turns; what the processes have at rest must not grow."""
    seed = settings.seed if settings.seed is not None else random.randrange(2**32)
    report = SoakReport(seed, settings.warm_up_rests)
    flags = ("--num-threads", "1", "--num-kv-slots", str(settings.kv_slots))
    with tempfile.TemporaryDirectory() as logs:
        async with ChaosStack(settings.base, settings.draft, flags, Path(logs)) as stack:
            await _soak(stack, settings, report)
    measured = [name for name, rests in report.footprints.items() if len(rests) > report.warm_up_rests]
    growth = {name: round(report.growth(name), 4) for name in measured}
    return Findings(
        {**vars(report), "growth": growth, "failures": report.failures},
        checkpoints=(settings.base, settings.draft),
        exit_code=1 if report.failures else 0,
    )


async def _soak(stack: ChaosStack, settings: SoakSettings, report: SoakReport) -> None:
    wanted = kinds(settings.tokens)
    async with gateway_at(stack.address) as stub:
        whole = await undisturbed(stub, wanted)

    async def client(name: str, until_s: float) -> None:
        """Each request over a connection of its own."""
        async for kind, answer, verdict, request_id in answers(
            lambda: gateway_at(stack.address), wanted, whole, name, is_over=lambda: time.monotonic() > until_s
        ):
            report.answers[verdict.value] += 1
            if verdict is not Verdict.RIGHT and kind.gives_up_after is None:
                report.bad_answers.append(f"{request_id} ({kind.name}): {verdict.value}, {answer.error}")

    end_s = time.monotonic() + settings.seconds
    for rest in itertools.count():
        if (now_s := time.monotonic()) > end_s:
            return
        names = [f"{report.seed}-{rest}-{number}" for number in range(settings.clients)]
        await asyncio.gather(*(client(name, now_s + settings.load_s) for name in names))
        await asyncio.sleep(_REST_S)
        await _count(stack, report)


async def _count(stack: ChaosStack, report: SoakReport) -> None:
    for name, held in (await leftovers(stack)).items():
        if held != NOTHING:
            report.left_over.append(f"{name} holds {held} at rest {len(report.footprints.get(name, []))}")
    for name, process in stack.processes.items():
        found = footprint(process.pid)
        if found is not None:
            report.footprints.setdefault(name, []).append(found)
    latest = {name: asdict(rests[-1]) for name, rests in report.footprints.items()}
    print(json.dumps({"answers": dict(report.answers), **latest}), file=sys.stderr, flush=True)


BENCHMARK = Benchmark("python -m bench soak", __doc__, SoakSettings, measure)
