"""What every rank of `bench ranks` does, started by torchrun; rank 0 writes the result."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from bench.harness.tables import Row
from bench.ranks.constants import Constants, measure_constants
from bench.ranks.estimates import round_rows
from bench.ranks.passes import BASE, CPU, DRAFT, load, measure_rounds
from easyspec.parallel.rank_placement import RankPlacement
from easyspec.parallel.ranks import Ranks, join_group, leave_group
from easyspec.planner.scheme import draft_schemes

_LAYER_PARALLEL_SIZES = (1, 4)


@torch.inference_mode()
def work(folder: Path, num_rounds: int) -> None:
    """Constants, then rounds of every scheme of as many ranks, into `folder`."""
    torch.set_num_threads(1)
    ranks = join_group(CPU)
    own = folder / f"rank-{ranks.rank}"
    constants = measure_constants(ranks, own)
    rows = list(_rounds(own, ranks, constants, num_rounds))
    if ranks.rank == 0:
        group = {"constants": asdict(constants), "rows": rows}
        (folder / "result.json").write_text(json.dumps(group), encoding="utf-8")
    leave_group()


def _rounds(folder: Path, ranks: Ranks, constants: Constants, num_rounds: int) -> Iterator[Row]:
    """On rank 0 estimates and measurements of every scheme."""
    schemes = [
        scheme
        for scheme in draft_schemes(DRAFT, ranks.size)
        if scheme.num_ranks == ranks.size and scheme.layer_parallel_size in _LAYER_PARALLEL_SIZES
    ]
    base = load(folder, BASE, ranks)
    for placement in RankPlacement:
        placed = [scheme for scheme in schemes if scheme.placement == placement.value]
        if not placed:
            continue
        draft = load(folder, DRAFT, ranks, placement)
        for scheme in placed:
            measured = measure_rounds(base, draft, scheme, ranks, num_rounds)
            if measured is not None:
                yield from round_rows(constants, scheme, measured)


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
