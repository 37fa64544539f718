"""What every rank of `bench ranks` does, started by torchrun; rank 0 writes the result."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.harness.tables import Row
from bench.ranks.constants import measure_constants
from bench.ranks.estimates import round_rows
from bench.ranks.passes import BASE, CPU, DRAFT, load, measure_rounds
from easyspec.parallel.rank_placement import RankPlacement
from easyspec.parallel.ranks import join_group, leave_group
from easyspec.planner.scheme import draft_schemes

_LAYER_PARALLEL_SIZES = (1, 4)


@torch.inference_mode()
def work(folder: Path, num_rounds: int) -> None:
    """Constants, then rounds of every scheme of as many ranks, into `folder`."""
    torch.set_num_threads(1)
    ranks = join_group(CPU)
    own = folder / f"rank-{ranks.rank}"
    constants = measure_constants(ranks, own)
    base = load(own, BASE, ranks)
    rows: list[Row] = []
    for placement in RankPlacement:
        schemes = [
            scheme
            for scheme in draft_schemes(DRAFT, ranks.size)
            if (scheme.num_ranks, scheme.placement) == (ranks.size, placement.value)
            and scheme.layer_parallel_size in _LAYER_PARALLEL_SIZES
        ]
        if not schemes:
            continue
        draft = load(own, DRAFT, ranks, placement)
        for scheme in schemes:
            if (measured_ms := measure_rounds(base, draft, scheme, ranks, num_rounds)) is not None:
                rows += round_rows(constants, scheme, measured_ms)
    if ranks.rank == 0:
        group = {"constants": asdict(constants), "rows": rows}
        (folder / "result.json").write_text(json.dumps(group), encoding="utf-8")
    leave_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
