"""`python -m bench.kernels`: what passes of the native executor take, by rows, weight formats and context.

Random weights in the shape of a small real model. Three tables: all products of a pass, attention of all layers, and
whole passes as the services run them, head included.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from rich.console import Console

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from bench.harness.random_weights import chain, random_decoder, write_config
from bench.harness.tables import Column, ResultTable, Row
from bench.harness.turns import progress_on
from easyspec.errors import ConfigurationError
from easyspec.model.row_layout import lay_out
from easyspec.model.weight_reader import WeightFormat
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.native import NativeExecutor
from easyspec.ops.native_library import CodePath, library_problem
from easyspec.ops.program import Attend, HeadShape, Product, ProgramWriter
from easyspec.ops.weights import DenseWeight, Weight, quantise
from easyspec.planner.shape import ModelShape

SHAPES = {
    "smollm2-135m": ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49_152),
    "tiny": ModelShape("tiny", 2, 64, 4, 2, 16, 96, 340),
}
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
ROWS = (1, 4, 8, 16, 32)
CONTEXTS = (200, 1000, 4000)
_WARM_UPS = 2
_CPU = torch.device("cpu")
_COLUMNS = (
    Column("what", "what"),
    Column("format", "format"),
    Column("context", "context"),
    Column("rows", "num_rows"),
    Column("median ms", "median_ms", ".3f"),
    Column("GB/s", "gb_per_s", ".1f"),
)


@dataclass(frozen=True)
class KernelSettings:
    shape: Annotated[str, flag("The model's shape.", choices=SHAPES)] = "smollm2-135m"
    formats: Annotated[tuple[str, ...], flag("Of weights; one or several.", choices=FORMATS)] = FORMATS
    rows: Annotated[tuple[int, ...], flag("Rows of a pass; one or several.")] = ROWS
    contexts: Annotated[tuple[int, ...], flag("Tokens before the rows; one or several.")] = CONTEXTS
    threads: Annotated[int, flag("CPU threads.", minimum=1)] = 2
    repeats: Annotated[int, flag("Runs that the median is of.", minimum=1)] = 20
    code_path: Annotated[
        str | None,
        flag("Instructions [default: the fastest that run].", choices=[path.name.lower() for path in CodePath]),
    ] = None
    byte_inputs: Annotated[bool, flag("Round inputs of integer weights to 8 bits, as `native-8bit` does.")] = False


def timing(
    what: str,
    format_name: str,
    context: int,
    num_rows: int,
    num_bytes: int,
    run: Callable[[], object],
    num_repeats: int,
) -> Row:
    """The median of several runs, after some that do not count; `num_bytes` are those of the weights, or for attention
    of the keys and values, that a run reads."""
    times_ms = []
    for _ in range(num_repeats + _WARM_UPS):
        started = time.perf_counter()
        run()
        times_ms.append(1e3 * (time.perf_counter() - started))
    median_ms = statistics.median(times_ms[_WARM_UPS:])
    cell = {"what": what, "format": format_name, "context": context, "num_rows": num_rows}
    return {**cell, "median_ms": median_ms, "gb_per_s": num_bytes / median_ms / 1e6}


def weight_in(format_name: str, num_outputs: int, num_inputs: int) -> Weight:
    values = torch.randn(num_outputs, num_inputs)
    if format_name.startswith("int"):
        return quantise(values, int(format_name.removeprefix("int")))
    return DenseWeight(values.to(getattr(torch, format_name)))


def product_timings(executor: NativeExecutor, settings: KernelSettings, format_name: str) -> Iterator[Row]:
    """All products of a pass but for the head's."""
    shape, program = SHAPES[settings.shape], ProgramWriter()
    heads, hidden = HeadShape(shape.num_heads, shape.num_kv_heads, shape.head_dim), shape.hidden_size
    sizes = [(heads.qkv_width, hidden), (hidden, heads.num_heads * heads.head_dim)]
    sizes += [(shape.intermediate_size, hidden)] * 2 + [(hidden, shape.intermediate_size)]
    buffers = {width: program.buffer(width) for size in sizes for width in size}
    num_bytes = 0
    for num_outputs, num_inputs in sizes * shape.num_layers:
        weight = executor.pack(weight_in(format_name, num_outputs, num_inputs))
        num_bytes += weight.num_bytes
        target = program.buffer(num_outputs) if num_outputs == num_inputs else buffers[num_outputs]
        program.add(Product(buffers[num_inputs], target, weight))
    compiled, pool = executor.compile(program), KVPool(1, 1, 16, 0, torch.float32, _CPU)
    for num_rows in settings.rows:
        run = partial(compiled.run, lay_out([chain(num_rows, 0)]).rows, pool)
        yield timing("products", format_name, 0, num_rows, num_bytes, run, settings.repeats)


def attention_timings(executor: NativeExecutor, settings: KernelSettings, context: int) -> Iterator[Row]:
    """Attention of all layers over keys and values in bfloat16."""
    shape = SHAPES[settings.shape]
    heads = HeadShape(shape.num_heads, shape.num_kv_heads, shape.head_dim)
    most_slots = context + max(settings.rows)
    pool = KVPool(shape.num_layers, heads.num_kv_heads, heads.head_dim, most_slots, torch.bfloat16, _CPU)
    program = ProgramWriter()
    qkv, attended = program.buffer(heads.qkv_width), program.buffer(heads.num_heads * heads.head_dim)
    for layer in range(shape.num_layers):
        program.add(Attend(qkv, attended, layer, heads))
    compiled = executor.compile(program)
    num_bytes = context * KVPool.slot_bytes(shape.num_layers, heads.num_kv_heads, heads.head_dim, torch.bfloat16)
    for num_rows in settings.rows:
        run = partial(compiled.run, lay_out([chain(num_rows, context)]).rows, pool)
        yield timing("attention", "bfloat16", context, num_rows, num_bytes, run, settings.repeats)


def pass_timings(executor: NativeExecutor, settings: KernelSettings, format_name: str) -> Iterator[Row]:
    """Whole passes: laying out, all layers, and logits of every row."""
    is_rounded = format_name.startswith("int")
    weights = WeightFormat(format_name) if is_rounded else WeightFormat.AUTO
    most_slots = max(settings.contexts) + max(settings.rows)
    with tempfile.TemporaryDirectory() as name:
        folder = write_config(Path(name), SHAPES[settings.shape], "bfloat16" if is_rounded else format_name, most_slots)
        decoder = random_decoder(folder, executor, weights=weights)
    pool = decoder.new_pool(most_slots)
    for context in settings.contexts:
        for num_rows in settings.rows:

            def run(context: int = context, num_rows: int = num_rows) -> object:
                return decoder.forward(lay_out([chain(num_rows, context)]), pool, logit_rows=range(num_rows))

            yield timing("pass", format_name, context, num_rows, decoder.num_weight_bytes, run, settings.repeats)


@torch.inference_mode()
def measure(settings: KernelSettings, console: Console) -> Findings:
    """All three tables; ConfigurationError where the library was not built."""
    if (problem := library_problem()) is not None:
        raise ConfigurationError(f"bench.kernels needs the native executor: {problem}")
    path = CodePath[settings.code_path.upper()] if settings.code_path else None
    executor = NativeExecutor(settings.threads, path, has_byte_inputs=settings.byte_inputs)
    timings: list[Row] = []
    with progress_on(console) as progress:
        bar = progress.add_task("", total=2 * len(settings.formats) + len(settings.contexts))

        def note(found: Iterator[Row], what: str) -> None:
            progress.update(bar, description=what)
            timings.extend(found)
            progress.advance(bar)

        for format_name in settings.formats:
            note(product_timings(executor, settings, format_name), f"products, {format_name}")
        for context in settings.contexts:
            note(attention_timings(executor, settings, context), f"attention, {context} tokens")
        for format_name in settings.formats:
            note(pass_timings(executor, settings, format_name), f"passes, {format_name}")
    title = f"{executor.name}, {settings.threads} threads, {settings.shape}"
    return Findings(
        {"executor": executor.name, "num_threads": settings.threads, "results": timings},
        [ResultTable(title, _COLUMNS, timings)],
    )


BENCHMARK = Benchmark("python -m bench.kernels", __doc__, KernelSettings, measure)
