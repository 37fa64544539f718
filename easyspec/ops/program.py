"""A pass as a list of operations on buffers: written once by the decoder, run by any executor.

Dimensions: `T` rows of the pass, `S` selected rows (the rows that get logits), `E` hidden size, `F` MLP size, `Q` query
heads, `H` KV heads, `D` head size, `V` vocabulary, `X` experts.

The contract of every operation: *the bits of a row of its result are a function of that row's inputs and, for
attention, of the keys and values that the row sees in the order of their positions.* Other rows of the pass, their
number, and the number of threads change nothing. Buffers are float32 [T, width] or [S, width].
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from easyspec.ops.packed import PackedWeight


class Activation(enum.IntEnum):
    """What an MLP applies to its gate, or to its inner values where it has none.

    CLAMPED_SWIGLU, of gpt-oss, is of gates alone and changes the other factor too: min(gate, 7) * sigmoid(1.702 *
    min(gate, 7)) * (up, held within 7 of 0, + 1).
    """

    SILU = 0
    GELU_TANH = 1
    CLAMPED_SWIGLU = 2


@dataclass(frozen=True)
class Buffer:
    """`index` in the program; `is_selected`: it has the selected rows instead of all, `per_row` times as many."""

    index: int
    width: int
    is_selected: bool = False
    per_row: int = 1

    def num_rows(self, num_rows: int, num_selected: int) -> int:
        return num_selected if self.is_selected else num_rows * self.per_row


@dataclass(frozen=True)
class Embed:
    """output[t] = table[token_ids[t]] * factor, [T, E]."""

    table: PackedWeight
    output: Buffer
    factor: float = 1.0


@dataclass(frozen=True)
class Norm:
    """output = input / sqrt(mean(input ** 2) + eps) * weight + bias, weight float32 [E]; the mean along a row.

    `is_centred`: of the input less its mean. A weight that is shorter than a row is of the columns from `column` on;
    the others keep what `output` has.
    """

    input: Buffer
    output: Buffer
    weight: torch.Tensor
    eps: float
    bias: torch.Tensor | None = None
    is_centred: bool = False
    column: int = 0

    @property
    def width(self) -> int:
        """Columns that are normed."""
        return min(len(self.weight), self.input.width)


@dataclass(frozen=True)
class Product:
    """output = input @ weight.T + bias, or output += that; each output is one sum along the inputs, in their order.

    Inputs of quantised weights are rounded to 16 or 8 bits in groups of 32, whose sums of integers are exact. Outputs
    begin at `column` of the output's rows, a multiple of 16; there are whole 16s of them unless they reach its end.
    """

    input: Buffer
    output: Buffer
    weight: PackedWeight
    bias: torch.Tensor | None = None
    adds: bool = False
    column: int = 0


@dataclass(frozen=True)
class Gated:
    """output [T, F] = activation(input @ gate.T + gate_bias) * (input @ up.T + up_bias)."""

    input: Buffer
    output: Buffer
    gate: PackedWeight
    up: PackedWeight
    activation: Activation
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Activate:
    """buffer = activation(buffer), of an MLP without a gate."""

    buffer: Buffer
    activation: Activation


@dataclass(frozen=True)
class Route:
    """Each row's best `num_chosen` experts by its `logits` [T, X], best first, of equals the lower number.

    routes [T, 2 * num_chosen]: their numbers, then their shares: exp(logit) over the sum of that of all experts, or of
    the chosen ones if `is_normalised`.
    """

    logits: Buffer
    routes: Buffer
    num_chosen: int
    is_normalised: bool


@dataclass(frozen=True)
class Expert:
    """One expert's matrices; gate, up: [F, E], down: [E, F]."""

    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class ExpertGated:
    """`Gated` of each pair of a row and an expert that it chose: [T, E] -> [T * num_chosen, F].

    Rows of `output` are in an order of the executor's, which ExpertProduct keeps and Combine undoes. Of experts that no
    row chose nothing is read. Weights of all experts have one format.
    """

    input: Buffer
    routes: Buffer
    output: Buffer
    experts: tuple[Expert, ...]
    activation: Activation


@dataclass(frozen=True)
class ExpertProduct:
    """`Product` by `down` of each pair: [T * num_chosen, F] -> [T * num_chosen, E]."""

    input: Buffer
    routes: Buffer
    output: Buffer
    experts: tuple[Expert, ...]


@dataclass(frozen=True)
class Combine:
    """output [T, E] = sum of share * part over a row's experts, in the order of choice; or output += that."""

    input: Buffer
    routes: Buffer
    output: Buffer
    adds: bool = False


@dataclass(frozen=True)
class HeadShape:
    """Heads of one layer's attention: `num_heads` query heads over `num_kv_heads` keys and values of `head_dim`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def qkv_width(self) -> int:
        """Queries, keys and values of a row side by side."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class Rotary:
    """cosines and sines, float32 [positions, rotary_dim / 2]: dimension i turns against i + rotary_dim / 2."""

    cosines: torch.Tensor
    sines: torch.Tensor

    @property
    def rotary_dim(self) -> int:
        return 2 * self.cosines.shape[1]


@dataclass(frozen=True)
class Rotate:
    """Norm (where there are head norms) and turn queries and keys of `qkv` [T, (Q + 2 H) * D], and scale the queries.

    `is_norm_last`: turned first, then normed.

    Writes keys and values to the rows' slots of `layer` in the KV pool, rounded to its type; queries stay in `qkv`.
    """

    qkv: Buffer
    layer: int
    heads: HeadShape
    rotary: Rotary | None
    query_scale: float
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    eps: float = 0.0
    is_norm_last: bool = False


@dataclass(frozen=True)
class Attend:
    """output [T, Q * D]: softmax attention of the queries in `qkv` over what each row sees in `layer` of the KV pool.

    Sums are formed by spans of 256 positions with fixed borders, then over the spans in their order. `window` is how
    many positions a row sees, its own included; scores become soft_cap * tanh(score / soft_cap); `sinks` [Q] are scores
    of a position that has no value.
    """

    qkv: Buffer
    output: Buffer
    layer: int
    heads: HeadShape
    window: int | None = None
    soft_cap: float | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Accumulate:
    """outputs[i] = start + parts[0] + ... + parts[i], added in this order; None where that sum is not wanted.

    An output may be `start` itself; the last one is always wanted.
    """

    start: Buffer
    parts: tuple[Buffer, ...]
    outputs: tuple[Buffer | None, ...]


@dataclass(frozen=True)
class Select:
    """The selected rows of `input`: [T, E] -> [S, E]."""

    input: Buffer
    output: Buffer


@dataclass(frozen=True)
class Scale:
    """buffer *= factor, then soft_cap * tanh(buffer / soft_cap) where there is a soft cap."""

    buffer: Buffer
    factor: float = 1.0
    soft_cap: float | None = None


@dataclass(frozen=True)
class SumOverRanks:
    """Every rank's `buffers` added in rank order, on every rank; one that has no `is_part` of its own adds zeros."""

    buffers: tuple[Buffer, ...]
    is_part: bool = True


@dataclass(frozen=True)
class GatherFromRanks:
    """All ranks' `parts` one after the other, on every rank: the first `len(outputs)` of them.

    Every rank has as many parts, None where a rank has nothing (the last ones).
    """

    parts: tuple[Buffer | None, ...]
    outputs: tuple[Buffer, ...]


Operation: TypeAlias = (
    Embed
    | Norm
    | Product
    | Gated
    | Activate
    | Rotate
    | Attend
    | Accumulate
    | Select
    | Scale
    | Route
    | ExpertGated
    | ExpertProduct
    | Combine
)
Collective: TypeAlias = SumOverRanks | GatherFromRanks


class ProgramWriter:
    """Collects a program's operations and buffers."""

    def __init__(self) -> None:
        self.steps: list[Operation | Collective] = []
        self.buffers: list[Buffer] = []

    def buffer(self, width: int, *, is_selected: bool = False, per_row: int = 1) -> Buffer:
        self.buffers.append(Buffer(len(self.buffers), width, is_selected, per_row))
        return self.buffers[-1]

    def add(self, *steps: Operation | Collective) -> None:
        """Append steps, which take effect in this order."""
        self.steps.extend(steps)

    def stretches(self) -> list[list[Operation] | Collective]:
        """The steps as operations that run without a pause, and the collectives between them."""
        found: list[list[Operation] | Collective] = []
        for step in self.steps:
            if isinstance(step, SumOverRanks | GatherFromRanks):
                found.append(step)
            elif found and isinstance(found[-1], list):
                found[-1].append(step)
            else:
                found.append([step])
        return found


def sizes(buffers: Sequence[Buffer], num_rows: int, num_selected: int) -> list[int]:
    """Floats that each buffer takes in a pass; rows are filled up to `padded_width`."""
    return [padded_width(b.width) * b.num_rows(num_rows, num_selected) for b in buffers]


def padded_width(width: int) -> int:
    """Columns that a row of a buffer takes: whole groups of 32."""
    return -(-width // 32) * 32
