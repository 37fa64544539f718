"""A model of two layers written straight as a program, with every option of the operations, and texts to run it on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from easyspec.model.kv_cache import KvMemory
from easyspec.model.row_layout import Segment, lay_out
from easyspec.ops.executor import Executor
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.native import NativeExecutor
from easyspec.ops.native_library import CodePath, library_problem, load
from easyspec.ops.program import (
    Activation,
    Attend,
    Embed,
    Gated,
    HeadShape,
    Norm,
    Product,
    ProgramWriter,
    Rotary,
    Rotate,
    Scale,
    Select,
)
from easyspec.ops.reference import ReferenceExecutor
from easyspec.ops.weights import DenseWeight, QuantisedWeight, Weight, quantise

CPU = torch.device("cpu")
FORMATS = ("float32", "bfloat16", "float16", "int8", "int8 by halves", "int4", "int4 without minima")
# Every code path that runs here; none where the library was not built.
PATHS = [] if library_problem() is not None else [path for path in CodePath if path <= load().easyspec_best_path()]
EXECUTOR_NAMES = [*(f"{path.name.lower()}{bits}" for path in PATHS for bits in ("", "-8bit")), "reference"]
EPS = 1e-5


def executor_of(name: str, num_threads: int = 1) -> Executor:
    """One of EXECUTOR_NAMES."""
    if name == "reference":
        return ReferenceExecutor(CPU)
    path, _, bits = name.partition("-")
    return NativeExecutor(num_threads, CodePath[path.upper()], has_byte_inputs=bits == "8bit")


def weight_of(values: torch.Tensor, format_name: str) -> Weight:
    """A dense matrix in a format."""
    if format_name == "int4 without minima":
        whole = quantise(values, 4)
        return QuantisedWeight(4, whole.codes, whole.scales)
    if format_name == "int8 by halves":  # and with minima
        whole = quantise(values, 8)
        halves = torch.stack([whole.scales, whole.scales / 2], dim=-1).flatten(1)
        return QuantisedWeight(8, whole.codes, halves, -2.0 * whole.scales)
    if format_name in ("int8", "int4"):
        return quantise(values, int(format_name[-1]))
    return DenseWeight(values.to(getattr(torch, format_name)))


@dataclass(frozen=True)
class Options:
    """What a small model's operations are asked for."""

    heads: HeadShape = field(default_factory=lambda: HeadShape(4, 2, 16))
    hidden_size: int = 72
    mlp_size: int = 90
    vocab_size: int = 101
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    has_biases: bool = False
    has_head_norms: bool = False
    kv_dtype: torch.dtype = torch.float32


class SmallModel:
    """Two layers, a final norm and a head; weights are random with a fixed seed."""

    def __init__(self, executor: Executor, format_name: str, options: Options, num_positions: int = 800) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._executor = executor
        self._format = format_name
        o, heads = options, options.heads
        writer = ProgramWriter()
        hidden, normed = writer.buffer(o.hidden_size), writer.buffer(o.hidden_size)
        qkv, attended = writer.buffer(heads.qkv_width), writer.buffer(heads.num_heads * heads.head_dim)
        inner, selected = writer.buffer(o.mlp_size), writer.buffer(o.hidden_size, is_selected=True)
        last, self._logits = (writer.buffer(size, is_selected=True) for size in (o.hidden_size, o.vocab_size))
        rotary = self._rotary(num_positions, heads.head_dim // 4 * 2)
        bias = self._vector if o.has_biases else lambda size: None
        writer.add(Embed(self._matrix(o.vocab_size, o.hidden_size), hidden, factor=2.0))
        for layer in range(2):
            norms = [self._vector(heads.head_dim) if o.has_head_norms else None for _ in range(2)]
            sinks = self._vector(heads.num_heads) if o.has_sinks else None
            writer.add(
                Norm(hidden, normed, self._vector(o.hidden_size), EPS),
                Product(normed, qkv, self._matrix(heads.qkv_width, o.hidden_size), bias(heads.qkv_width)),
                Rotate(qkv, layer, heads, rotary, heads.head_dim**-0.5, *norms, EPS),
                Attend(qkv, attended, layer, heads, o.window, o.soft_cap, sinks),
                Product(attended, hidden, self._matrix(o.hidden_size, attended.width), bias(o.hidden_size), adds=True),
                Norm(hidden, normed, self._vector(o.hidden_size), EPS),
                Gated(
                    normed,
                    inner,
                    self._matrix(o.mlp_size, o.hidden_size),
                    self._matrix(o.mlp_size, o.hidden_size),
                    Activation.SILU if layer else Activation.GELU_TANH,
                    bias(o.mlp_size),
                    bias(o.mlp_size),
                ),
                Product(inner, hidden, self._matrix(o.hidden_size, o.mlp_size), bias(o.hidden_size), adds=True),
            )
        writer.add(
            Select(hidden, selected),
            Norm(selected, last, self._vector(o.hidden_size), EPS),
            Product(last, self._logits, self._matrix(o.vocab_size, o.hidden_size)),
            Scale(self._logits, 1.5, soft_cap=30.0),
        )
        self._program = executor.compile(writer)
        self.pool = KVPool(2, heads.num_kv_heads, heads.head_dim, 4 * num_positions, o.kv_dtype, CPU)
        self.memory = KvMemory(self.pool, shares_prefixes=False)

    def run(self, *segments: Segment) -> list[torch.Tensor]:
        """One pass; the logits of every segment's rows."""
        counts = [len(segment) for segment in segments]
        rows = lay_out(segments).select(range(sum(counts)))
        (logits,) = self._program.run(rows, self.pool, outputs=[self._logits])
        return list(logits.clone().split(counts))

    def _matrix(self, num_outputs: int, num_inputs: int) -> object:
        values = torch.randn(num_outputs, num_inputs, generator=self._generator) * num_inputs**-0.5
        return self._executor.pack(weight_of(values, self._format))

    def _vector(self, size: int) -> torch.Tensor:
        return torch.rand(size, generator=self._generator) + 0.5

    @staticmethod
    def _rotary(num_positions: int, rotary_dim: int) -> Rotary:
        frequencies = 100.0 ** -(torch.arange(0, rotary_dim, 2) / rotary_dim)
        angles = torch.arange(num_positions)[:, None] * frequencies[None]
        return Rotary(angles.cos(), angles.sin())
