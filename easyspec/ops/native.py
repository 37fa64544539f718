"""The native executor: whole passes in C++ on the CPU, one call each, with threads of its own.

Dimensions: `T` rows of the pass, `S` selected rows, `O` outputs and `I` inputs of a weight.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from easyspec.errors import ConfigurationError
from easyspec.ops.kv_pool import KVPool
from easyspec.ops.native_choice import choose, rank
from easyspec.ops.native_library import CodePath, Op, Packed, Pass, best_path, load
from easyspec.ops.program import (
    Accumulate,
    Activate,
    Attend,
    Buffer,
    Combine,
    Embed,
    ExpertGated,
    ExpertProduct,
    Gated,
    Norm,
    Operation,
    Product,
    ProgramWriter,
    Rotate,
    Route,
    Scale,
    Select,
    padded_width,
)
from easyspec.ops.reference import run_collective
from easyspec.ops.rows import PassRows
from easyspec.ops.weights import DenseWeight, Weight
from easyspec.ops.workspace import Workspace
from easyspec.parallel.ranks import SINGLE_RANK, Ranks
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.ranking import RankedTokens
from easyspec.speculation.sampling import ChoiceRow

_DENSE_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_QUANTISED_FORMATS = {8: 3, 4: 4}
_FP4 = 5
_WIDE_SCALES, _BFLOAT16_SCALES = 1, 2
_PANEL = 16
_ALIGNMENT = 64
# Of the library (easyspec/ops/cpp/kernels.h), whose buffers for attention are of fixed size.
_MAX_QUERIES, _MAX_HEAD_DIM = 64, 512
# What the library looks at before it computes (easyspec/ops/cpp/api.h).
_NO_MEMORY = -1
_CHECKED = ("", "token_ids", "positions", "slots", "extra slots", "selected rows")
_MAX_PLACEMENTS = 256
_KINDS: dict[type, int] = {
    Embed: 0,
    Norm: 1,
    Product: 2,
    Gated: 3,
    Rotate: 4,
    Attend: 5,
    Accumulate: 6,
    Select: 7,
    Scale: 8,
    Activate: 9,
    Route: 10,
    ExpertGated: 11,
    ExpertProduct: 12,
    Combine: 13,
}


# Fields that operations and the library's have alike, and what an operation calls the buffers that the library has.
_SAME_FIELDS: tuple[str, ...] = (
    "layer",
    "adds",
    "activation",
    "window",
    "column",
    "width",
    "is_centred",
    "is_norm_last",
    "num_chosen",
)
_SAME_FIELDS += ("is_normalised", "eps", "factor", "soft_cap")
_BUFFER_FIELDS = {"input": "input", "qkv": "input", "start": "input", "buffer": "input", "logits": "input"}
_BUFFER_FIELDS |= {"output": "output", "routes": "routes"}


class NativeWeight:
    """A weight in panels of 16 outputs (easyspec/ops/cpp/packed.h)."""

    def __init__(self, weight: Weight, *, has_byte_inputs: bool = False) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self.format_name = weight.format_name
        self.packed = Packed(num_outputs=self.num_outputs, num_inputs=self.num_inputs)
        if isinstance(weight, DenseWeight):
            self.packed.format = _DENSE_FORMATS[weight.values.dtype]
        else:
            self.packed.format = _FP4 if weight.is_fp4 else _QUANTISED_FORMATS[weight.bits]
            if weight.has_wide_scales:
                self.packed.scale_type = _BFLOAT16_SCALES if weight.is_fp4 else _WIDE_SCALES
            self.packed.has_minimum = weight.minima is not None
            self.packed.has_half_scales = weight.has_half_scales
            self.packed.has_byte_inputs = has_byte_inputs
        self.num_bytes = load().easyspec_packed_bytes(ctypes.byref(self.packed))
        # The library keeps the address: the storage lives as long as this object, and is never moved.
        self._storage = torch.empty(self.num_bytes + _ALIGNMENT, dtype=torch.uint8)
        self.packed.data = self._storage.data_ptr() + -self._storage.data_ptr() % _ALIGNMENT
        if isinstance(weight, DenseWeight):
            values = weight.values if weight.values.stride(1) == 1 else weight.values.contiguous()
            row_bytes = values.stride(0) * values.itemsize
            load().easyspec_pack_dense(
                ctypes.byref(self.packed), values.data_ptr(), _DENSE_FORMATS[values.dtype], row_bytes
            )
        else:
            # Names, not temporaries: they must outlive the call that reads their memory.
            codes, scales = weight.codes.contiguous(), weight.scales.float().contiguous()
            minima = None if weight.minima is None else weight.minima.float().contiguous()
            minima_address = None if minima is None else minima.data_ptr()
            load().easyspec_pack_codes(ctypes.byref(self.packed), codes.data_ptr(), scales.data_ptr(), minima_address)

    def row(self, index: int) -> torch.Tensor:
        """An output's weights, float32 [I]."""
        values = torch.empty(self.num_inputs)
        load().easyspec_unpack_row(ctypes.byref(self.packed), index, values.data_ptr())
        return values

    @property
    def address(self) -> int:
        return ctypes.addressof(self.packed)


class NativeExecutor:
    """Runs programs in the C++ library on the code path that suits this processor, or a slower one that is named.

    With `has_byte_inputs` inputs of integer weights are rounded to 8 bits instead of 16, as llama.cpp does: products of
    several rows are faster, and results are as far from those of float32 as there.
    """

    def __init__(self, num_threads: int, path: CodePath | None = None, *, has_byte_inputs: bool = False) -> None:
        self.path = best_path() if path is None else path
        self._has_byte_inputs = has_byte_inputs
        self.device = torch.device("cpu")
        self.num_threads = num_threads
        self._workspace = Workspace(self.device)
        self._engine = load().easyspec_engine_new(int(self.path), num_threads)
        # Not __del__, which may not run at exit: the engine's threads must end before the interpreter.
        self._finalizer = weakref.finalize(self, load().easyspec_engine_free, self._engine)

    @property
    def name(self) -> str:
        return f"native-{self.path.name.lower()}" + ("-8bit" if self._has_byte_inputs else "")

    def use_threads(self, num_threads: int) -> None:
        self.num_threads = num_threads
        load().easyspec_engine_use_threads(self._engine, num_threads)

    def pack(self, weight: Weight) -> NativeWeight:
        return NativeWeight(weight, has_byte_inputs=self._has_byte_inputs)

    @property
    def chooses_lazily(self) -> bool:
        return True

    def choose_tokens(
        self, base_logits: torch.Tensor, rows: Sequence[ChoiceRow], places: Sequence[int] | None = None
    ) -> list[int]:
        places = range(len(base_logits)) if places is None else places
        return [choose(self._engine, base_logits, place, row) for place, row in zip(places, rows, strict=True)]

    def rank_tokens(
        self,
        logits: torch.Tensor,
        positions: Sequence[int],
        samplings: Sequence[SamplingParameters],
        num_best: int,
        named_ids: torch.Tensor | None = None,
    ) -> list[RankedTokens]:
        return rank(self._engine, logits, positions, samplings, num_best, named_ids)

    def compile(self, program: ProgramWriter, ranks: Ranks = SINGLE_RANK) -> NativeProgram:
        return NativeProgram(self, self._engine, program, ranks, self._workspace)


@dataclass(frozen=True)
class _Placement:
    """Where a program's buffers begin in the workspace, which was at `address` then."""

    address: int
    starts: Sequence[int]
    pointers: ctypes.Array[ctypes.c_void_p]


class NativeProgram:
    """A program that the library has prepared: one call for each stretch between collectives."""

    def __init__(
        self, executor: NativeExecutor, engine: int, program: ProgramWriter, ranks: Ranks, workspace: Workspace
    ) -> None:
        self._executor = executor  # whose threads it runs on: it must not go before
        self._buffers = program.buffers
        self._workspace = workspace
        self._ranks = ranks
        self._kept: list[Any] = []  # what the library points at
        operations = [step for step in program.steps if isinstance(step, Embed | Rotate)]
        tables = [op.rotary.cosines for op in operations if isinstance(op, Rotate) and op.rotary is not None]
        embedded = [op.table.num_outputs for op in operations if isinstance(op, Embed)]
        self._num_positions = min(map(len, tables), default=0)
        self._num_tokens = min(embedded, default=0)
        self._has_attention = any(isinstance(step, Rotate | Attend) for step in program.steps)
        self._steps = [
            self._prepare(engine, stretch) if isinstance(stretch, list) else stretch for stretch in program.stretches()
        ]
        self._placements: dict[tuple[int, int], _Placement] = {}
        self._run_stretch = load().easyspec_program_run

    def _prepare(self, engine: int, operations: Sequence[Operation]) -> int:
        widths = np.asarray([padded_width(buffer.width) for buffer in self._buffers], dtype=np.int64)
        per_row = [0 if buffer.is_selected else buffer.per_row for buffer in self._buffers]
        rows_of_buffer = np.asarray(per_row, dtype=np.int32)
        ops = (Op * len(operations))(*map(self._translate, operations))
        handle: int = load().easyspec_program_new(
            engine, ops, len(operations), widths.ctypes.data, rows_of_buffer.ctypes.data, len(self._buffers)
        )
        # Arguments of `finalize` must not refer to `self`, which would then live for ever.
        weakref.finalize(self, load().easyspec_program_free, handle)
        return handle

    def _translate(self, operation: Operation) -> Op:
        op = Op(kind=_KINDS[type(operation)], factor=1.0)
        for name in _SAME_FIELDS:
            if (value := getattr(operation, name, None)) is not None:
                setattr(op, name, value)
        for name, field in _BUFFER_FIELDS.items():
            if (buffer := getattr(operation, name, None)) is not None:
                setattr(op, field, buffer.index)
        match operation:
            case Embed():
                op.weight = self._weight(operation.table)
            case Norm():
                op.norm, op.bias = (self._vector(vector, 32) for vector in (operation.weight, operation.bias))
                op.is_part = operation.width < operation.input.width
            case Product():
                assert operation.column % _PANEL == 0, "panels begin at whole 16s"
                op.weight, op.bias = self._weight(operation.weight), self._vector(operation.bias, _PANEL)
            case Gated():
                op.weight, op.second = self._weight(operation.gate), self._weight(operation.up)
                op.bias, op.second_bias = (
                    self._vector(bias, _PANEL) for bias in (operation.gate_bias, operation.up_bias)
                )
            case Rotate():
                op.factor = operation.query_scale
                norms = operation.query_norm, operation.key_norm
                op.norm, op.second_norm = (self._vector(norm, 32) for norm in norms)
                if operation.rotary is not None:
                    op.rotary_dim = operation.rotary.rotary_dim
                    op.cosines = self._kept_address(operation.rotary.cosines)
                    op.sines = self._kept_address(operation.rotary.sines)
                self._set_heads(operation, op)
            case Attend():
                op.sinks = self._vector(operation.sinks, 1)
                self._set_heads(operation, op)
            case Accumulate():
                op.num_parts = len(operation.parts)
                op.parts = self._indices([part.index for part in operation.parts])
                op.outputs = self._indices([-1 if out is None else out.index for out in operation.outputs])
            case Route():
                op.output, op.num_experts = operation.routes.index, operation.logits.width
            case ExpertGated() | ExpertProduct() | Combine():
                op.num_chosen = operation.routes.width // 2
                if not isinstance(operation, Combine):
                    self._translate_experts(operation, op)
        return op

    def _translate_experts(self, operation: ExpertGated | ExpertProduct, op: Op) -> None:
        experts = operation.experts
        op.num_experts = len(experts)
        if isinstance(operation, ExpertProduct):
            op.experts = self._weights([expert.down for expert in experts])
            op.expert_biases = self._vectors([expert.down_bias for expert in experts])
            return
        op.experts = self._weights([expert.gate for expert in experts])
        op.second_experts = self._weights([expert.up for expert in experts])
        op.expert_biases = self._vectors([expert.gate_bias for expert in experts])
        op.second_expert_biases = self._vectors([expert.up_bias for expert in experts])

    def _weights(self, weights: Sequence[object]) -> int:
        formats = {(weight.num_outputs, weight.packed.format) for weight in weights if isinstance(weight, NativeWeight)}
        assert len(formats) == 1, "experts alike"
        return self._kept_addresses([self._weight(weight) for weight in weights])

    def _vectors(self, vectors: Sequence[torch.Tensor | None]) -> int | None:
        addresses = [self._vector(vector, _PANEL) for vector in vectors]
        return (
            self._kept_addresses([address for address in addresses if address is not None]) if all(addresses) else None
        )

    def _kept_addresses(self, addresses: Sequence[int]) -> int:
        return self._kept_address(torch.tensor(addresses, dtype=torch.int64))

    @staticmethod
    def _set_heads(operation: Rotate | Attend, op: Op) -> None:
        shape = operation.heads
        if shape.num_heads > _MAX_QUERIES * shape.num_kv_heads or shape.head_dim > _MAX_HEAD_DIM:
            raise ConfigurationError(
                f"executor is native: {shape} has more than {_MAX_QUERIES} query heads a KV head, or heads above "
                f"{_MAX_HEAD_DIM}; allowed for this model: reference"
            )
        op.num_heads, op.num_kv_heads, op.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim

    def _weight(self, weight: object) -> int:
        assert isinstance(weight, NativeWeight), "packed by this executor"
        self._kept.append(weight)
        return weight.address

    def _vector(self, vector: torch.Tensor | None, multiple: int) -> int | None:
        """A vector filled up with zeros."""
        if vector is None:
            return None
        padded = torch.nn.functional.pad(vector.float(), (0, -len(vector) % multiple))
        return self._kept_address(padded)

    def _indices(self, values: Sequence[int]) -> int:
        return self._kept_address(torch.tensor(values, dtype=torch.int32))

    def _kept_address(self, tensor: torch.Tensor) -> int:
        # The copy, if one was made, is what the library reads: keep that one.
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def run(
        self,
        rows: PassRows,
        pool: KVPool,
        inputs: Mapping[Buffer, torch.Tensor] | None = None,
        outputs: Sequence[Buffer] = (),
    ) -> list[torch.Tensor]:
        num_rows, num_selected = len(rows), len(rows.selected)
        place = self._placed(num_rows, num_selected)
        for buffer, value in (inputs or {}).items():
            self._view(buffer, place.starts, num_rows, num_selected).copy_(value)
        # `rows`, `committed` and `place` hold the memory behind these addresses until the last stretch has run.
        committed = (ctypes.c_void_p * len(rows.committed))(*(slots.ctypes.data for slots in rows.committed))
        described = Pass(
            num_rows,
            num_selected,
            rows.token_ids.ctypes.data,
            rows.positions.ctypes.data,
            rows.slots.ctypes.data,
            rows.selected.ctypes.data,
            rows.segment_of_row.ctypes.data,
            ctypes.addressof(committed),
            rows.num_committed.ctypes.data,
            rows.extra.ctypes.data,
            rows.first_extra.ctypes.data,
            ctypes.addressof(place.pointers),
            pool.keys.data_ptr(),
            pool.values.data_ptr(),
            pool.keys.shape[2],
            pool.keys.shape[3] * pool.keys.itemsize,
            _DENSE_FORMATS[pool.keys.dtype],
            self._num_tokens,
            self._num_positions,
            pool.num_slots + 1 if self._has_attention else 0,
        )
        for step in self._steps:
            if isinstance(step, int):
                wrong = self._run_stretch(step, ctypes.byref(described))
                if wrong == _NO_MEMORY:
                    raise MemoryError(f"no memory for a pass of {num_rows} rows")
                assert wrong == 0, f"{_CHECKED[wrong]} are out of range"
                continue
            views = [self._view(buffer, place.starts, num_rows, num_selected) for buffer in self._buffers]
            run_collective(step, views, self._ranks)
        return [self._view(buffer, place.starts, num_rows, num_selected) for buffer in outputs]

    def _placed(self, num_rows: int, num_selected: int) -> _Placement:
        """Where the buffers are in a pass of that size: found once, as long as the workspace stays where it is."""
        place = self._placements.get((num_rows, num_selected))
        # Another program that needs more memory moves the workspace: an old placement would point at freed memory.
        if place is None or place.address != self._workspace.address:
            starts = self._workspace.place(self._buffers, num_rows, num_selected)
            address = self._workspace.address
            pointers = (ctypes.c_void_p * max(1, len(self._buffers)))(
                *(address + 4 * start for start in starts[: len(self._buffers)])
            )
            place = _Placement(address, starts, pointers)
            if len(self._placements) >= _MAX_PLACEMENTS:
                self._placements.clear()
            self._placements[num_rows, num_selected] = place
        return place

    def _view(self, buffer: Buffer, starts: Sequence[int], num_rows: int, num_selected: int) -> torch.Tensor:
        return self._workspace.view(buffer, starts[buffer.index], buffer.num_rows(num_rows, num_selected))
