"""`python -m bench.kernels`: what passes of the native executor take, by rows, weight formats and context.

Random weights in the shape of a small real model. Three tables: all products of a pass, attention of all layers, and
whole passes as the services run them, head included.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from bench.decode import write_report
from bench.provenance import provenance
from bench.random_weights import RandomWeights, write_config
from easyspec.model.config import load_config
from easyspec.model.decoder import Decoder
from easyspec.model.row_layout import RowLayout, Segment, lay_out
from easyspec.model.weight_reader import WeightFormat
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.native import NativeExecutor, library_problem
from easyspec.ops.native_library import CodePath
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


@dataclass(frozen=True)
class Timing:
    """The median of several runs. `gb_per_s` is how fast weights, or for attention keys and values, were read."""

    what: str
    format: str
    context: int
    num_rows: int
    median_ms: float
    gb_per_s: float


def median_ms(run: Callable[[], object], num_repeats: int) -> float:
    """Milliseconds of a run, after some that do not count."""
    times = []
    for _ in range(num_repeats + _WARM_UPS):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[_WARM_UPS:])


def rows_behind(context: int, num_rows: int) -> RowLayout:
    """One text's next rows."""
    slots = np.arange(1, context + num_rows + 1)
    positions = range(context, context + num_rows)
    visible = [position + 1 for position in positions]
    return lay_out([Segment([7] * num_rows, positions, slots[context:].tolist(), visible, slots)])


def weight_in(format_name: str, num_outputs: int, num_inputs: int) -> Weight:
    """Random weights."""
    values = torch.randn(num_outputs, num_inputs)
    if format_name.startswith("int"):
        return quantise(values, int(format_name.removeprefix("int")))
    return DenseWeight(values.to(getattr(torch, format_name)))


def product_timings(
    executor: NativeExecutor, shape: ModelShape, format_name: str, rows: Sequence[int], num_repeats: int
) -> Iterator[Timing]:
    """All products of a pass but for the head's."""
    program = ProgramWriter()
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
    for num_rows in rows:
        layout = rows_behind(0, num_rows)
        taken_ms = median_ms(lambda layout=layout: compiled.run(layout.rows, pool), num_repeats)  # type: ignore[misc]
        yield Timing("products", format_name, 0, num_rows, taken_ms, num_bytes / taken_ms / 1e6)


def attention_timings(
    executor: NativeExecutor, shape: ModelShape, context: int, rows: Sequence[int], num_repeats: int
) -> Iterator[Timing]:
    """Attention of all layers over keys and values in bfloat16."""
    heads = HeadShape(shape.num_heads, shape.num_kv_heads, shape.head_dim)
    most_slots = context + max(rows)
    pool = KVPool(shape.num_layers, heads.num_kv_heads, heads.head_dim, most_slots, torch.bfloat16, _CPU)
    program = ProgramWriter()
    qkv, attended = program.buffer(heads.qkv_width), program.buffer(heads.num_heads * heads.head_dim)
    for layer in range(shape.num_layers):
        program.add(Attend(qkv, attended, layer, heads))
    compiled = executor.compile(program)
    num_bytes = context * KVPool.slot_bytes(shape.num_layers, heads.num_kv_heads, heads.head_dim, torch.bfloat16)
    for num_rows in rows:
        layout = rows_behind(context, num_rows)
        taken_ms = median_ms(lambda layout=layout: compiled.run(layout.rows, pool), num_repeats)  # type: ignore[misc]
        yield Timing("attention", "bfloat16", context, num_rows, taken_ms, num_bytes / taken_ms / 1e6)


def pass_timings(
    executor: NativeExecutor,
    shape: ModelShape,
    format_name: str,
    contexts: Sequence[int],
    rows: Sequence[int],
    num_repeats: int,
) -> Iterator[Timing]:
    """Whole passes: laying out, all layers, and logits of every row."""
    is_rounded = format_name.startswith("int")
    weights = WeightFormat(format_name) if is_rounded else WeightFormat.AUTO
    most_slots = max(contexts) + max(rows)
    with tempfile.TemporaryDirectory() as name:
        folder = write_config(Path(name), shape, "bfloat16" if is_rounded else format_name, most_slots)
        config = load_config(folder)
        decoder = Decoder(folder, config, executor, weights=weights, open_tensors=lambda _: RandomWeights(_CPU))
    pool = decoder.new_pool(most_slots)
    for context in contexts:
        for num_rows in rows:

            def run(context: int = context, num_rows: int = num_rows) -> object:
                return decoder.forward(rows_behind(context, num_rows), pool, logit_rows=range(num_rows))

            taken_ms = median_ms(run, num_repeats)
            yield Timing("pass", format_name, context, num_rows, taken_ms, decoder.num_weight_bytes / taken_ms / 1e6)


@torch.inference_mode()
def measure(arguments: argparse.Namespace, executor: NativeExecutor) -> list[Timing]:
    """All three tables, printed line by line."""
    shape, rows, num_repeats = SHAPES[arguments.shape], arguments.rows, arguments.repeats
    timings: list[Timing] = []
    print(f"{'what':10} {'format':9} {'context':>7} {'rows':>5} {'median ms':>10} {'GB/s':>7}")

    def note(found: Iterator[Timing]) -> None:
        for each in found:
            timings.append(each)
            print(
                f"{each.what:10} {each.format:9} {each.context:7} {each.num_rows:5} {each.median_ms:10.3f}"
                f" {each.gb_per_s:7.1f}",
                flush=True,
            )

    for format_name in arguments.formats:
        note(product_timings(executor, shape, format_name, rows, num_repeats))
    for context in arguments.contexts:
        note(attention_timings(executor, shape, context, rows, num_repeats))
    for format_name in arguments.formats:
        note(pass_timings(executor, shape, format_name, arguments.contexts, rows, num_repeats))
    return timings


def main(argv: Sequence[str]) -> int:
    """Measure, print, and write JSON if told to; 2 where the library was not built."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description="passes of the native executor")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="the model's shape")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS, metavar="FORMAT")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, help="tokens before the rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20, help="runs that the median is of")
    parser.add_argument("--code-path", choices=[path.name.lower() for path in CodePath], help="default: the fastest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args(argv)
    if (problem := library_problem()) is not None:
        print(f"bench.kernels: {problem}", file=sys.stderr)
        return 2
    path = None if arguments.code_path is None else CodePath[arguments.code_path.upper()]
    executor = NativeExecutor(arguments.threads, path)
    print(f"{executor.name}, {arguments.threads} threads, {arguments.shape}")
    timings = measure(arguments, executor)
    if arguments.json is not None:
        command = shlex.join(["python", "-m", "bench.kernels", *argv])
        about = {"command": command, "executor": executor.name, "num_threads": arguments.threads}
        write_report(arguments.json, about | provenance([]) | {"results": [asdict(timing) for timing in timings]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
