"""`python -m bench layer-groups`: where layers at the same time pay: a fuzzy draft step beside the exact one.

Drafts of random weights, by width and depth, on the native executor. A step has four rows, as a level of a tree of the
usual width, behind a short text; plans take turns. How many tokens a fuzzy step costs is another question: a plan pays
where it is faster by more than that (docs/decisions/0004, docs/sources.md).
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from bench.harness.random_weights import random_decoder, write_config
from bench.harness.tables import Column, ResultTable, Row
from bench.harness.turns import progress_on
from drafter_service.model.plan_choice import time_plans
from easyspec.model.kv_cache import KvMemory
from easyspec.ops.executor import choose_executor
from easyspec.parallel.layer_groups import paper_plan, sequential_plan
from easyspec.planner.shape import ModelShape
from easyspec.speculation.parameters import MlpPlacement

_HEAD_DIM, _VOCAB = 64, 8192
_NUM_SLOTS = 256
_GROUP_SIZES = (2, 4)
_NAMES = tuple(f"{mlp.value} {size}" for mlp, size in itertools.product(MlpPlacement, _GROUP_SIZES))
_COLUMNS = (
    Column("width", "width"),
    Column("layers", "num_layers"),
    Column("threads", "num_threads"),
    Column("exact ms", "exact_ms", ".3f"),
    *(Column(name, lambda row, name=name: row["speed_ups"][name], ".2f") for name in _NAMES),  # type: ignore[misc]
)


@dataclass(frozen=True)
class LayerGroupSettings:
    widths: Annotated[tuple[int, ...], flag("Hidden sizes.")] = (64, 128, 256, 512, 1024)
    layers: Annotated[tuple[int, ...], flag("Numbers of layers.")] = (8, 16, 32)
    threads: Annotated[tuple[int, ...], flag("Threads of the executor.")] = (1, 2)


def shape_of(width: int, num_layers: int) -> ModelShape:
    """A draft of such a width, its MLP 8 / 3 as wide, as Llama's are."""
    num_heads = max(1, width // _HEAD_DIM)
    intermediate = -(-8 * width // 3 // 32) * 32
    return ModelShape("draft", num_layers, width, num_heads, num_heads, _HEAD_DIM, intermediate, _VOCAB)


def time_draft(folder: Path, width: int, num_layers: int, num_threads: int) -> Row:
    """A draft's exact step in milliseconds, and how many times as fast each plan's is, by its name and group size; its
    weights are in bfloat16, as drafts ship."""
    write_config(folder, shape_of(width, num_layers), "bfloat16", 512)
    decoder = random_decoder(folder, choose_executor("native", torch.device("cpu"), num_threads=num_threads))
    memory = KvMemory(decoder.new_pool(_NUM_SLOTS), shares_prefixes=False)
    plans = [paper_plan(num_layers, size, mlp) for mlp, size in itertools.product(MlpPlacement, _GROUP_SIZES)]
    with torch.inference_mode():
        exact_ms, *fuzzy_ms = time_plans(decoder, memory, [sequential_plan(num_layers), *plans])
    speed_ups = {name: round(exact_ms / each_ms, 3) for name, each_ms in zip(_NAMES, fuzzy_ms, strict=True)}
    found = {"exact_ms": round(exact_ms, 4), "speed_ups": speed_ups}
    return {"width": width, "num_layers": num_layers, "num_threads": num_threads, **found}


def measure(settings: LayerGroupSettings, console: Console) -> Findings:
    """Time every draft on every number of threads."""
    drafts = list(itertools.product(settings.widths, settings.layers, settings.threads))
    with tempfile.TemporaryDirectory() as name, progress_on(console) as progress:
        bar = progress.add_task("drafts", total=len(drafts))
        times = []
        for width, num_layers, num_threads in drafts:
            times.append(time_draft(Path(name), width, num_layers, num_threads))
            progress.advance(bar)
    title = "Times as fast as the exact step: MLPs as the paper places them or staged, layers in groups of"
    return Findings({"times": times}, [ResultTable(title, _COLUMNS, times)])


BENCHMARK = Benchmark("python -m bench layer-groups", __doc__, LayerGroupSettings, measure)
