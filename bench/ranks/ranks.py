"""`python -m bench ranks`: the planner against rounds of real ranks over gloo, on this machine.

Measures the cost model's constants, then rounds of a random-weight pair under every kind of scheme, on one rank and on
several that torchrun starts, and prints the planner's estimates beside them. About two minutes with the defaults.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from bench.harness.machine import REPOSITORY
from bench.harness.tables import Column, ResultTable
from bench.ranks.section import CONSTANT_COLUMNS
from easyspec.parallel.launch import torchrun_arguments

_TIMEOUT_S = 170
_COLUMNS = (
    Column("scheme", "scheme"),
    Column("ranks", "num_ranks"),
    Column("figure", "figure"),
    Column("model", "model_ms", ".2f"),
    Column("measured", "measured_ms", ".2f"),
    Column("ratio", "ratio", ".2f"),
)


@dataclass(frozen=True)
class RankSettings:
    ranks: Annotated[tuple[int, ...], flag("Sizes of groups; one or several.", minimum=1)] = (1, 2, 4)
    rounds: Annotated[int, flag("Measured rounds of each scheme.", minimum=1)] = 15


def measure(settings: RankSettings, console: Console) -> Findings:
    before = _cpu_seconds()
    groups: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for size in settings.ranks:
            worker = ["-m", "bench.ranks.worker", name, str(settings.rounds)]
            command = [sys.executable, *torchrun_arguments(size), *worker]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=_TIMEOUT_S)
            groups.append(json.loads((Path(name) / "result.json").read_text(encoding="utf-8")))
    busy, total, own = (now - then for now, then in zip(_cpu_seconds(), before, strict=True))
    share = max(0.0, busy - own) / max(total, 1e-9)
    rows = [row for group in groups for row in group["rows"]]
    return Findings(
        {"num_rounds": settings.rounds, "others_cpu_share": share, "groups": groups},
        [
            ResultTable("constants", CONSTANT_COLUMNS, [group["constants"] for group in groups]),
            ResultTable("planner and measurement, ms", _COLUMNS, rows),
        ],
        [f"CPU time of this machine that others took meanwhile: {share:.0%}"],
    )


def _cpu_seconds() -> tuple[float, float, float]:
    """CPU time so far: that the machine was busy, all, and that this process and its ended children took."""
    with open("/proc/stat", encoding="ascii") as stat:
        seconds = [int(field) / os.sysconf("SC_CLK_TCK") for field in stat.readline().split()[1:9]]
    idle = seconds[3] + seconds[4]
    return sum(seconds) - idle, sum(seconds), sum(os.times()[:4])


BENCHMARK = Benchmark("python -m bench ranks", __doc__, RankSettings, measure)
