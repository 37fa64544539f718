"""`python -m bench.gpu --json FILE`: passes of an 8B base and a 1B draft of random weights on one GPU.

Passes run on the reference executor. Every pass is timed as a round pays for it: from segments on the host to logits
that the host could read. It is compared with the byte floor: the time in which the bytes that the pass must read
(weights and KV) go through the memory at the measured speed of a copy. `--tiny` runs small shapes, on a CPU too: its
figures mean nothing.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from bench.harness.random_weights import random_decoder, write_config
from bench.harness.tables import Column, ResultTable, Row
from easyspec.errors import ConfigurationError
from easyspec.model.kv_cache import KvMemory, SessionSlots
from easyspec.model.row_layout import Segment, lay_out
from easyspec.model.row_probe import is_row_invariant
from easyspec.ops.reference import ReferenceExecutor
from easyspec.parallel.layer_groups import LayerPlan, paper_plan, sequential_plan
from easyspec.planner.shape import KNOWN_SHAPES, ModelShape
from easyspec.speculation.parameters import MlpPlacement


@dataclass(frozen=True)
class GpuSettings:
    tiny: Annotated[bool, flag("Small shapes, on whatever there is: tests that it runs.")] = False


@dataclass(frozen=True)
class Shapes:
    """Shapes and sizes of one run; `context` tokens stand before the rows that are measured."""

    base: ModelShape = KNOWN_SHAPES["llama-3-8b"]
    draft: ModelShape = KNOWN_SHAPES["llama-3.2-1b"]
    dtype: str = "bfloat16"
    max_model_len: int = 8192
    context: int = 500
    base_rows: tuple[int, ...] = (1, 4, 8, 16, 32, 64)
    num_sessions: tuple[int, ...] = (1, 4, 16)
    draft_width: int = 4
    layer_parallel_size: int = 4
    num_kv_slots: int = 16_384
    num_copied_bytes: int = 2**30
    num_repeats: int = 30


TINY = Shapes(
    base=ModelShape("tiny-base", 3, 64, 4, 2, 16, 96, 340),
    draft=ModelShape("tiny-draft", 6, 64, 4, 2, 16, 96, 340),
    dtype="float32",
    max_model_len=64,
    context=20,
    base_rows=(1, 4),
    num_sessions=(1, 2),
    layer_parallel_size=2,
    num_kv_slots=1024,
    num_copied_bytes=2**20,
    num_repeats=2,
)
_COLUMNS = (
    Column("model", "model"),
    Column("plan", "plan"),
    Column("sessions", "num_sessions"),
    Column("rows", "num_rows"),
    Column("median ms", "median_ms", ".3f"),
    Column("best ms", "best_ms", ".3f"),
    Column("floor ms", "floor_ms", ".3f"),
    Column("x floor", "times_floor", ".2f"),
)


class Device:
    """Where it runs, and what its memory is measured to do."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times_s(self, run: Callable[[], object], num_repeats: int) -> list[float]:
        """Seconds of each run, the device's work included, after three that do not count."""
        times: list[float] = []
        for index in range(num_repeats + 3):
            self.wait()
            started = time.perf_counter()
            run()
            self.wait()
            if index >= 3:
                times.append(time.perf_counter() - started)
        return times

    def copy_bytes_per_s(self, num_bytes: int, num_repeats: int) -> float:
        """Bytes per second that a copy of `num_bytes` reads and writes; the best of several."""
        source = torch.ones(num_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * num_bytes / min(self.times_s(lambda: target.copy_(source), num_repeats))

    def describe(self) -> dict[str, Any]:
        if self.device.type != "cuda":
            return {"name": "cpu"}
        found = torch.cuda.get_device_properties(self.device)
        return {
            "name": found.name,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "multiprocessors": found.multi_processor_count,
            "capability": f"{found.major}.{found.minor}",
            "cuda": torch.version.cuda,
        }


class Bench:
    """A model of random weights, sessions with a context in its KV pool, and its passes."""

    def __init__(self, shape: ModelShape, shapes: Shapes, device: Device, folder: Path) -> None:
        self._shape, self._shapes, self._device = shape, shapes, device
        write_config(folder, shape, shapes.dtype, shapes.max_model_len)
        self.decoder = random_decoder(folder, ReferenceExecutor(device.device))
        self._pool = self.decoder.new_pool(shapes.num_kv_slots)
        self._memory = KvMemory(self._pool, shares_prefixes=False)
        self._sessions: list[SessionSlots] = []

    def prepare(self) -> bool:
        """Fill contexts; returns whether all forms of pass have the same bits."""
        is_invariant = is_row_invariant(self.decoder, self._pool)
        self._sessions = [SessionSlots(self._memory) for _ in range(max(self._shapes.num_sessions))]
        for slots in self._sessions:
            segment = self._segment(slots, self._shapes.context)
            self.decoder.forward(lay_out([segment]), self._pool)
        return is_invariant

    def measure(self, plan: LayerPlan, name: str, num_sessions: int, num_rows: int, speed: float) -> Row:
        """Passes of `num_rows` more rows for each of so many sessions; `floor_ms` is what their bytes take at the speed
        of a copy."""
        slots = self._sessions[:num_sessions]
        segments = [self._segment(each, num_rows) for each in slots]

        def run() -> torch.Tensor:
            layout = lay_out(segments)
            return self.decoder.forward(layout, self._pool, plan, range(len(layout.rows))).logits

        times = self._device.times_s(run, self._shapes.num_repeats)
        for each in slots:
            each.truncate(self._shapes.context)
        # Weights but for the embedding table, and every session's keys and values.
        shape, itemsize = self._shape, self.decoder.config.dtype.itemsize
        layers = shape.num_layers * (shape.attention_parameters + shape.mlp_parameters)
        num_values = 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers
        num_tokens = num_sessions * (self._shapes.context + num_rows)
        floor_ms = 1e3 * itemsize * (layers + shape.head_parameters + num_values * num_tokens) / speed
        return {
            "model": self._shape.name,
            "plan": name,
            "num_sessions": num_sessions,
            "num_rows": num_rows,
            "median_ms": round(1e3 * statistics.median(times), 4),
            "best_ms": round(1e3 * min(times), 4),
            "floor_ms": round(floor_ms, 4),
            "times_floor": round(1e3 * statistics.median(times) / floor_ms, 2),
        }

    def _segment(self, slots: SessionSlots, num_rows: int) -> Segment:
        start = slots.num_cached
        positions = range(start, start + num_rows)
        own = slots.extend(num_rows)
        token_ids = [position % self._shape.vocab_size for position in positions]
        return Segment(token_ids, positions, own, [position + 1 for position in positions], slots.by_position)


@torch.inference_mode()
def measure(settings: GpuSettings, console: Console) -> Findings:
    """Verifier passes by rows of one session, and by sessions of a plain row each; then steps of a level's width of the
    draft: sequential, and the fuzzy plans of the same model. ConfigurationError where there is no GPU for the full
    shapes."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not settings.tiny:
        raise ConfigurationError("torch finds no GPU; --tiny runs small shapes on the CPU")
    shapes, device = TINY if settings.tiny else Shapes(), Device(torch.device("cuda" if has_gpu else "cpu"))
    speed = device.copy_bytes_per_s(shapes.num_copied_bytes, shapes.num_repeats)
    num_layers, size = shapes.draft.num_layers, shapes.layer_parallel_size
    plans = {
        "sequential": sequential_plan(num_layers),
        f"n{size}-sequential": paper_plan(num_layers, size, MlpPlacement.SEQUENTIAL),
        f"n{size}-staged": paper_plan(num_layers, size, MlpPlacement.STAGED),
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(shapes.base, shapes, device, Path(folder) / "base")
        is_invariant = bench.prepare()
        kinds = [(1, rows) for rows in shapes.base_rows] + [(count, 1) for count in shapes.num_sessions if count > 1]
        plan = sequential_plan(shapes.base.num_layers)
        results = [bench.measure(plan, "sequential", *kind, speed) for kind in kinds]
        bench = Bench(shapes.draft, shapes, device, Path(folder) / "draft")
        bench.prepare()
        for count in shapes.num_sessions:
            results += [bench.measure(plan, name, count, shapes.draft_width, speed) for name, plan in plans.items()]
    about, speed_gb = device.describe(), round(speed / 1e9, 1)
    measured = {"device": about, "copy_gb_per_s": speed_gb, "row_invariant": is_invariant}
    return Findings(
        {**measured, "settings": shapes, "results": results},
        [ResultTable(f"{about['name']}, a copy moves {speed_gb} GB/s", _COLUMNS, results)],
        [f"every form of the base model's passes has the same bits: {is_invariant}"],
    )


BENCHMARK = Benchmark("python -m bench.gpu", __doc__, GpuSettings, measure)
