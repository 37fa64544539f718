"""The reference executor: every operation in a line or two of torch. It runs anywhere and is the specification.

Dimensions: `T` rows of the pass, `S` selected rows, `Q` query heads, `H` KV heads, `G` query heads per KV head, `D`
head size, `P` positions that a row sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional

from easyspec.ops.kv_pool import KVPool
from easyspec.ops.program import (
    Accumulate,
    Activate,
    Activation,
    Attend,
    Buffer,
    Collective,
    Combine,
    Embed,
    ExpertGated,
    ExpertProduct,
    Gated,
    GatherFromRanks,
    Norm,
    Operation,
    Product,
    ProgramWriter,
    Rotary,
    Rotate,
    Route,
    Scale,
    Select,
    SumOverRanks,
)
from easyspec.ops.rows import PassRows
from easyspec.ops.weights import DenseWeight, Weight
from easyspec.ops.workspace import Workspace
from easyspec.parallel.ranks import SINGLE_RANK, Ranks
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.ranking import RankedTokens, rank_tokens
from easyspec.speculation.sampling import ChoiceRow, choose_tokens
from easyspec.speculation.transfer import is_remote, to_device

# A library's product of another number of rows may have other bits; products of one number of rows have not.
TILE_ROWS = 16
# Of CLAMPED_SWIGLU.
_GATE_LIMIT, _GATE_SLOPE = 7.0, 1.702


@dataclass(frozen=True)
class ReferenceWeight:
    """A dense matrix [O, I]; quantised weights are kept as float32."""

    values: torch.Tensor
    format_name: str

    @property
    def num_outputs(self) -> int:
        return self.values.shape[0]

    @property
    def num_inputs(self) -> int:
        return self.values.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ values.T in the weight's type: [T, I] -> float32 [T, O]."""
        padded = functional.pad(rows.to(self.values.dtype), (0, 0, 0, -len(rows) % TILE_ROWS))
        tiles = [functional.linear(tile, self.values) for tile in padded.split(TILE_ROWS)]
        return torch.cat(tiles)[: len(rows)].float() if tiles else rows.new_zeros(0, self.num_outputs)


class ReferenceExecutor:
    """Runs programs step by step in torch, in float32; inputs of products are rounded to the weight's type."""

    name = "reference"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._workspace = Workspace(device)

    @property
    def num_threads(self) -> int:
        """See Executor: torch's threads are not its own."""
        return 1

    def use_threads(self, num_threads: int) -> None:
        """See Executor."""

    def pack(self, weight: Weight) -> ReferenceWeight:
        values = weight.values if isinstance(weight, DenseWeight) else weight.dense()
        return ReferenceWeight(values.to(self.device).contiguous(), weight.format_name)

    @property
    def chooses_lazily(self) -> bool:
        return False

    def choose_tokens(
        self, base_logits: torch.Tensor, rows: Sequence[ChoiceRow], places: Sequence[int] | None = None
    ) -> list[int]:
        if places is not None:
            base_logits = base_logits[to_device(places, torch.int64, base_logits.device)]
        if is_remote(base_logits):
            return choose_tokens(base_logits, rows)
        are_numbers = base_logits.isfinite().all(dim=-1)
        choices = choose_tokens(base_logits.where(are_numbers[:, None], 0.0), rows)
        return [choice if is_one else -1 for choice, is_one in zip(choices, are_numbers.tolist(), strict=True)]

    def rank_tokens(
        self,
        logits: torch.Tensor,
        positions: Sequence[int],
        samplings: Sequence[SamplingParameters],
        num_best: int,
        named_ids: torch.Tensor | None = None,
    ) -> list[RankedTokens]:
        return rank_tokens(logits, positions, samplings, num_best, named_ids)

    def compile(self, program: ProgramWriter, ranks: Ranks = SINGLE_RANK) -> ReferenceProgram:
        return ReferenceProgram(program, ranks, self._workspace, self.device)


class ReferenceProgram:
    """A program as written."""

    def __init__(self, program: ProgramWriter, ranks: Ranks, workspace: Workspace, device: torch.device) -> None:
        self._program = program
        self._ranks = ranks
        self._workspace = workspace
        self._device = device

    def run(
        self,
        rows: PassRows,
        pool: KVPool,
        inputs: Mapping[Buffer, torch.Tensor] | None = None,
        outputs: Sequence[Buffer] = (),
    ) -> list[torch.Tensor]:
        num_selected = len(rows.selected)
        starts = self._workspace.place(self._program.buffers, len(rows), num_selected)
        views = [
            self._workspace.view(buffer, starts[buffer.index], buffer.num_rows(len(rows), num_selected))
            for buffer in self._program.buffers
        ]
        for buffer, value in (inputs or {}).items():
            views[buffer.index].copy_(value)
        machine = _Machine(rows, pool, views, self._device)
        for step in self._program.steps:
            if isinstance(step, SumOverRanks | GatherFromRanks):
                run_collective(step, views, self._ranks)
            else:
                machine.run(step)
        return [views[buffer.index] for buffer in outputs]


def run_collective(step: Collective, views: Sequence[torch.Tensor], ranks: Ranks) -> None:
    """Run a collective on the buffers' views; one call of `ranks`."""
    if isinstance(step, SumOverRanks):
        own = torch.stack([views[buffer.index] for buffer in step.buffers])
        total = ranks.sum(own if step.is_part else torch.zeros_like(own))
        for buffer, value in zip(step.buffers, total, strict=True):
            views[buffer.index].copy_(value)
        return
    like = views[step.outputs[0].index]
    parts = torch.stack([torch.zeros_like(like) if part is None else views[part.index] for part in step.parts])
    gathered = ranks.gather(parts).flatten(0, 1)  # [R * N / R, T, E]
    for output, value in zip(step.outputs, gathered, strict=False):
        views[output.index].copy_(value)


class _Machine:
    """Runs operations on the buffers of one pass."""

    def __init__(self, rows: PassRows, pool: KVPool, views: Sequence[torch.Tensor], device: torch.device) -> None:
        self._rows = rows
        self._pool = pool
        self._views = views
        self._device = device
        self._positions = torch.from_numpy(rows.positions).to(device, torch.int64)
        self._slots = torch.from_numpy(rows.slots).to(device)
        self._seen = [torch.from_numpy(rows.seen_slots(row)).to(device) for row in range(len(rows))]

    def run(self, op: Operation) -> None:
        views = self._views
        match op:
            case Embed():
                token_ids = torch.from_numpy(self._rows.token_ids).to(self._device, torch.int64)
                views[op.output.index].copy_(_weight(op.table).values[token_ids].float() * op.factor)
            case Norm():
                columns = slice(op.column, op.column + op.width)
                values = views[op.input.index][:, columns]
                values = values - values.mean(dim=-1, keepdim=True) if op.is_centred else values
                normed = unit_rms(values, op.eps) * op.weight[: op.width]
                views[op.output.index][:, columns] = _with_bias(normed, op.bias)
            case Product():
                product = _with_bias(_weight(op.weight)(views[op.input.index]), op.bias)
                output = views[op.output.index][:, op.column : op.column + op.weight.num_outputs]
                output.copy_(output + product if op.adds else product)
            case Gated():
                x = views[op.input.index]
                gate = _with_bias(_weight(op.gate)(x), op.gate_bias)
                up = _with_bias(_weight(op.up)(x), op.up_bias)
                views[op.output.index].copy_(_gated(op.activation, gate, up))
            case Activate():
                values = views[op.buffer.index]
                values.copy_(_by_row(partial(_activated, op.activation), values))
            case Route():
                logits, count = views[op.logits.index], op.num_chosen
                # Stable: of equal logits the first expert wins, as in the native executor.
                best, experts = logits.sort(dim=-1, descending=True, stable=True)
                of_which = best[:, :count] if op.is_normalised else best
                shares = (best[:, :count] - _by_row(partial(torch.logsumexp, dim=-1, keepdim=True), of_which)).exp()
                views[op.routes.index].copy_(torch.cat([experts[:, :count].float(), shares], dim=-1))
            case ExpertGated() | ExpertProduct():
                self._multiply_by_experts(op)
            case Combine():
                self._combine(op)
            case Rotate():
                self._rotate(op)
            case Attend():
                self._attend(op)
            case Accumulate():
                total = views[op.start.index]
                for part, wanted in zip(op.parts, op.outputs, strict=True):
                    total = total + views[part.index]
                    if wanted is not None:
                        views[wanted.index].copy_(total)
            case Select():
                selected = torch.from_numpy(self._rows.selected).to(self._device, torch.int64)
                views[op.output.index].copy_(views[op.input.index][selected])
            case Scale():
                scaled = views[op.buffer.index] * op.factor
                if op.soft_cap is not None:
                    scaled = op.soft_cap * _by_row(torch.tanh, scaled / op.soft_cap)
                views[op.buffer.index].copy_(scaled)

    def _rotate(self, op: Rotate) -> None:
        shape, qkv = op.heads, self._views[op.qkv.index]
        heads = qkv.view(len(qkv), -1, shape.head_dim)  # [T, Q + 2 H, D]
        queries, keys, values = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        if op.rotary is not None and op.is_norm_last:
            queries, keys = self._turned(queries, op.rotary), self._turned(keys, op.rotary)
        if op.query_norm is not None and op.key_norm is not None:
            queries = unit_rms(queries, op.eps) * op.query_norm[: shape.head_dim]
            keys = unit_rms(keys, op.eps) * op.key_norm[: shape.head_dim]
        if op.rotary is not None and not op.is_norm_last:
            queries, keys = self._turned(queries, op.rotary), self._turned(keys, op.rotary)
        heads[:, : shape.num_heads] = queries * op.query_scale
        for plane, new in ((self._pool.keys, keys), (self._pool.values, values)):
            plane[op.layer, :, self._slots, : shape.head_dim] = new.transpose(0, 1).to(plane.dtype)

    def _turned(self, heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
        cosines, sines = (table[self._positions][:, None] for table in (rotary.cosines, rotary.sines))
        first, second, rest = heads.tensor_split([rotary.rotary_dim // 2, rotary.rotary_dim], dim=-1)
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines, rest], dim=-1)

    def _multiply_by_experts(self, op: ExpertGated | ExpertProduct) -> None:
        """Pairs stand in the order of the rows, and of a row's choice."""
        routes, values = self._views[op.routes.index], self._views[op.input.index]
        chosen = routes[:, : op.routes.width // 2].long().flatten()  # [T * K]
        inputs = values.repeat_interleave(op.routes.width // 2, dim=0) if isinstance(op, ExpertGated) else values
        for number in chosen.unique().tolist():
            pairs, expert = (chosen == number).nonzero()[:, 0], op.experts[number]
            x = inputs[pairs]
            if isinstance(op, ExpertGated):
                gate = _with_bias(_weight(expert.gate)(x), expert.gate_bias)
                up = _with_bias(_weight(expert.up)(x), expert.up_bias)
                self._views[op.output.index][pairs] = _gated(op.activation, gate, up)
            else:
                self._views[op.output.index][pairs] = _with_bias(_weight(expert.down)(x), expert.down_bias)

    def _combine(self, op: Combine) -> None:
        shares = self._views[op.routes.index][:, op.routes.width // 2 :]  # [T, K]
        parts, output = self._views[op.input.index], self._views[op.output.index]
        parts = parts.reshape(*shares.shape, -1)  # [T, K, E]
        total = torch.zeros_like(output)
        # One by one: how the library groups a sum depends on the shape of the whole tensor.
        for choice in range(shares.shape[1]):
            total = total + shares[:, choice, None] * parts[:, choice]
        output.copy_(output + total if op.adds else total)

    def _attend(self, op: Attend) -> None:
        """One row after the other, so that none depends on what the others see."""
        shape, output = op.heads, self._views[op.output.index]
        queries = self._views[op.qkv.index][:, : shape.num_heads * shape.head_dim]
        for row, slots in enumerate(self._seen):
            slots = slots if op.window is None else slots[-op.window :]
            keys = self._pool.keys[op.layer, :, slots, : shape.head_dim].float()  # [H, P, D]
            values = self._pool.values[op.layer, :, slots, : shape.head_dim].float()
            query = queries[row].view(shape.num_kv_heads, -1, shape.head_dim)  # [H, G, D]
            scores = query @ keys.transpose(1, 2)  # [H, G, P]
            if op.soft_cap is not None:
                scores = op.soft_cap * torch.tanh(scores / op.soft_cap)
            if op.sinks is not None:
                scores = torch.cat([scores, op.sinks.view(shape.num_kv_heads, -1, 1)], dim=-1)
            weights = scores.softmax(dim=-1)[..., : len(slots)]
            output[row] = (weights @ values).flatten()


def unit_rms(rows: torch.Tensor, eps: float) -> torch.Tensor:
    """Rows divided by their root mean square over the last dimension."""
    return rows / (rows.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def _by_row(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Each row as a tensor of its own: a library computes the last few elements of a tensor by other instructions."""
    return torch.stack([function(row) for row in rows]) if len(rows) else rows


def _weight(packed: object) -> ReferenceWeight:
    assert isinstance(packed, ReferenceWeight), "packed by this executor"
    return packed


def _with_bias(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return product if bias is None else product + bias[: product.shape[1]]


def _gated(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if activation is Activation.CLAMPED_SWIGLU:
        gate, up = gate.clamp(max=_GATE_LIMIT), up.clamp(-_GATE_LIMIT, _GATE_LIMIT) + 1.0
        return _by_row(lambda row: row * torch.sigmoid(_GATE_SLOPE * row), gate) * up
    return _by_row(partial(_activated, activation), gate) * up


def _activated(activation: Activation, gate: torch.Tensor) -> torch.Tensor:
    if activation is Activation.SILU:
        return functional.silu(gate)
    return functional.gelu(gate, approximate="tanh")
