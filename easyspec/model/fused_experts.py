"""Experts that a checkpoint keeps in one tensor a layer, as gpt-oss does, under the names that each has by itself.

Dimensions: `X` experts, `E` hidden size, `F` MLP size, `G` groups of 32 columns.

Rows of gates and ups alternate. Matrices stand transposed, or (MXFP4) as rows of codes with a power of two for each
group.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch

from easyspec.model.quantization.mxfp4 import codes_of, mxfp4_values
from easyspec.model.stored_blocks import StoredBlocks
from easyspec.model.tensor_file import part_of
from easyspec.model.weights import Checkpoint

_EXPERT = re.compile(r"(?P<stem>.*\.mlp\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.(?P<kind>weight|bias)")
_FUSED = re.compile(r".*\.mlp\.experts\.gate_up_proj(_blocks)?")


@dataclass(frozen=True)
class _Place:
    """Where one expert's tensor stands: in which fused one, and in which of its alternating rows."""

    fused: str
    number: int
    rows: slice
    is_bias: bool

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of an expert's part of the fused tensor, by the shape of what is asked for."""
        step = self.rows.step or 1
        return (step * shape[0], *shape[1:])


def has_fused_experts(checkpoint: Checkpoint) -> bool:
    return any(_FUSED.fullmatch(name) for name in checkpoint)


class FusedExperts:
    """A TensorSource: a checkpoint whose experts are asked for one by one. See Checkpoint for errors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._num_experts = {
            name: checkpoint.shape(name)[0] for name in checkpoint if re.fullmatch(r".*\.mlp\.experts\.\w+", name)
        }
        self._last: tuple[tuple[str, int], torch.Tensor] | None = None

    def __enter__(self) -> FusedExperts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._checkpoint.__exit__(kind, error, tb)

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        place = _place(name)
        if place is None:
            return self._checkpoint.tensor(name, shape, rows, columns)
        if place.is_bias:
            values = self._dense(place, shape)[0][place.rows]
        elif self._is_quantized(place):
            values = mxfp4_values(*self._blocks(place, shape))
        else:
            values = self._dense(place, shape)[0].T[place.rows]
        return part_of(values, rows, columns).contiguous()

    def blocks(self, name: str, shape: tuple[int, ...], rows: range | None = None) -> StoredBlocks | None:
        place = _place(name)
        if place is None:
            return self._checkpoint.blocks(name, shape, rows)
        if not self._is_quantized(place) or not self._checkpoint.reads_values:
            return None
        part = slice(None) if rows is None else slice(rows.start, rows.stop)
        blocks, exponents = (values[part] for values in self._blocks(place, shape))
        codes = codes_of(blocks).numpy()
        return StoredBlocks(
            "MXFP4", codes.shape, {"codes": codes, "exponents": np.ascontiguousarray(exponents.numpy())}
        )

    def _is_quantized(self, place: _Place) -> bool:
        return f"{place.fused}_blocks" in self._num_experts

    def _dense(self, place: _Place, shape: tuple[int, ...]) -> torch.Tensor:
        """An expert's part of a fused tensor, [1, ...]: [E, 2 F], [F, E], or a bias."""
        fused = place.fused + ("_bias" if place.is_bias else "")
        whole = place.shape(shape)
        whole = (self._num_experts.get(fused, 0), *(whole if place.is_bias else reversed(whole)))
        number = range(place.number, place.number + 1)
        return self._kept(fused, place.number, lambda: self._checkpoint.tensor(fused, whole, number))

    def _blocks(self, place: _Place, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [F, G, 16] and [F, G] of an expert's matrix."""
        number = range(place.number, place.number + 1)
        outputs, inputs = place.shape(shape)
        groups = (self._num_experts[f"{place.fused}_blocks"], outputs, inputs // 32)
        blocks, scales = f"{place.fused}_blocks", f"{place.fused}_scales"
        found = self._kept(blocks, place.number, lambda: self._checkpoint.stored(blocks, (*groups, 16), number))
        exponents = self._checkpoint.stored(scales, groups, number)
        return found[0][place.rows], exponents[0][place.rows]

    def _kept(self, name: str, number: int, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What was read last is kept: gates and ups are asked for one after the other."""
        if self._last is None or self._last[0] != (name, number):
            self._last = ((name, number), read())
        return self._last[1]


def _place(name: str) -> _Place | None:
    if (found := _EXPERT.fullmatch(name)) is None:
        return None
    rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}[found["part"]]
    part = "down_proj" if found["part"] == "down" else "gate_up_proj"
    return _Place(f"{found['stem']}.{part}", int(found["number"]), rows, found["kind"] == "bias")
