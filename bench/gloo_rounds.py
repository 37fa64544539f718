"""`python -m bench.gloo_rounds`: the planner against rounds of real ranks over gloo, on this machine.

Measures the cost model's constants, then rounds of a random-weight pair under every kind of scheme, on one rank and on
several that torchrun starts, and prints the planner's estimates beside them. About two minutes with the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import REPOSITORY, current_commit, describe_machine
from easyspec.parallel.launch import torchrun_arguments

_WORKER_FLAG = "--worker"
_TIMEOUT_S = 170
_LAYER_PARALLEL_SIZE = 4


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write JSON if told to."""
    parser = argparse.ArgumentParser(prog="python -m bench.gloo_rounds", description="the planner against gloo ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="sizes of groups")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of each scheme")
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument(_WORKER_FLAG, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker is not None:
        _work(arguments.worker, arguments.rounds)
        return 0
    commit, watch = current_commit(), OtherLoad()
    groups = _measure(arguments.ranks, arguments.rounds)
    report = {
        "command": "python -m bench.gloo_rounds " + " ".join(word for word in argv),
        "machine": dataclasses.asdict(describe_machine()),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "num_rounds": arguments.rounds,
        "others_cpu_share": watch.share(),
        "groups": groups,
    }
    print(f"CPU time of this machine that others took meanwhile: {report['others_cpu_share']:.0%}")
    _print(report["groups"])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


class OtherLoad:
    """Which share of the machine's CPU time is taken by processes that are not this one or its ended children."""

    def __init__(self) -> None:
        self._started = self._times()

    def share(self) -> float:
        """Since this object was made."""
        busy, total, own = (now - then for now, then in zip(self._times(), self._started, strict=True))
        return max(0.0, busy - own) / max(total, 1e-9)

    @staticmethod
    def _times() -> tuple[float, float, float]:
        with open("/proc/stat", encoding="ascii") as stat:
            ticks = [int(field) for field in stat.readline().split()[1:9]]
        ticks_per_s = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        own = sum(os.times()[:4])
        return (sum(ticks) - idle) / ticks_per_s, sum(ticks) / ticks_per_s, own


def _measure(sizes: Sequence[int], num_rounds: int) -> list[dict[str, Any]]:
    from bench.gloo_models import BASE, DRAFT, TINY, write_model

    groups = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in (BASE, DRAFT, TINY):
            write_model(folder, shape)
        for size in sizes:
            command = [sys.executable, *torchrun_arguments(size), "-m", "bench.gloo_rounds"]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            subprocess.run(
                [*command, _WORKER_FLAG, name, "--rounds", str(num_rounds)],
                cwd=REPOSITORY,
                env=environment,
                check=True,
                timeout=_TIMEOUT_S,
            )
            groups.append(json.loads(_result_file(folder).read_text(encoding="utf-8")))
    return groups


def _result_file(folder: Path) -> Path:
    return folder / "result.json"


def _work(folder: Path, num_rounds: int) -> None:
    """What every rank does; rank 0 writes the result."""
    import torch

    from bench.gloo_constants import CPU, measure_constants
    from easyspec.parallel.ranks import join_group, leave_group

    torch.set_num_threads(1)
    ranks = join_group(CPU)
    with torch.inference_mode():
        constants = measure_constants(ranks, folder)
        rows = list(_rounds(folder, ranks, constants, num_rounds))
    if ranks.rank == 0:
        group = {
            "constants": dataclasses.asdict(constants),
            "rows": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows],
        }
        _result_file(folder).write_text(json.dumps(group), encoding="utf-8")
    leave_group()


def _rounds(folder: Path, ranks: Any, constants: Any, num_rounds: int) -> Iterator[Any]:
    """On rank 0 estimates and measurements of every scheme."""
    from bench.gloo_estimates import round_rows
    from bench.gloo_models import DRAFT
    from bench.gloo_passes import load, measure_rounds
    from easyspec.parallel.rank_placement import RankPlacement
    from easyspec.planner.scheme import draft_schemes

    sizes = (1, _LAYER_PARALLEL_SIZE)
    schemes = [
        scheme
        for scheme in draft_schemes(DRAFT, ranks.size)
        if scheme.num_ranks == ranks.size and scheme.layer_parallel_size in sizes
    ]
    base = load(folder / "base", ranks)
    for placement in RankPlacement:
        placed = [scheme for scheme in schemes if scheme.placement == placement.value]
        if not placed:
            continue
        draft = load(folder / "draft", ranks, placement)
        for scheme in placed:
            measured = measure_rounds(base, draft, scheme, ranks, num_rounds)
            if measured is not None:
                yield from round_rows(constants, scheme, measured)


def _print(groups: Sequence[Any]) -> None:
    console = Console(width=120, highlight=False)
    table = Table(title="planner and measurement, ms", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("ranks", "scheme", "figure", "model", "measured", "ratio"):
        table.add_column(column)
    for group in groups:
        console.print(group["constants"])
        for row in group["rows"]:
            cells = [f"{row[name]:.2f}" for name in ("model_ms", "measured_ms", "ratio")]
            table.add_row(str(row["num_ranks"]), row["scheme"], row["figure"], *cells)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
