"""Weight matrices as checkpoints have them, before an executor packs them.

Dimensions: `O` outputs, `I` inputs of a product; `C` groups of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

GROUP_SIZE = 32
# Twice the numbers of four bits that MXFP4 has, by their code.
FP4_DOUBLED = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


@dataclass(frozen=True)
class DenseWeight:
    """`values` [O, I], float32, bfloat16 or float16."""

    values: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    @property
    def format_name(self) -> str:
        return str(self.values.dtype).removeprefix("torch.")

    def dense(self) -> torch.Tensor:
        """float32 [O, I]."""
        return self.values.float()

    def outputs(self, rows: torch.Tensor) -> DenseWeight:
        """Some of the outputs, or all in another order: int64 [R]."""
        return DenseWeight(self.values[rows])


@dataclass(frozen=True)
class QuantisedWeight:
    """Integers in groups of 32 inputs with a scale each: value = code * scale + minimum.

    codes: int8 [O, I]; 8 bit: -128 to 127; 4 bit: 0 to 15, where value = (code - 8) * scale if there are no minima.
    scales: float32 [O, C], or of 8 bit [O, 2 * C], one for every 16 inputs; minima: float32 [O, C]. `has_wide_scales`
    says that scales or minima are not exact in float16. `is_fp4`: codes of 4 bits are places in FP4_DOUBLED, where
    value = FP4_DOUBLED[code] * scale, and wide scales are exact in bfloat16.
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None
    has_wide_scales: bool = False
    is_fp4: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def has_half_scales(self) -> bool:
        return self.scales.shape[1] > -(-self.codes.shape[1] // GROUP_SIZE)

    @property
    def layout(self) -> tuple[int, bool, bool, bool]:
        """What must be the same where weights are put together."""
        return (self.bits, self.minima is None, self.has_half_scales, self.is_fp4)

    @property
    def format_name(self) -> str:
        return "fp4" if self.is_fp4 else f"int{self.bits}"

    def columns(self, part: range) -> QuantisedWeight | None:
        """Some of the inputs, or None where they begin or end inside a group."""
        if part.start % GROUP_SIZE != 0 or (part.stop % GROUP_SIZE != 0 and part.stop != self.shape[1]):
            return None
        groups = slice(part.start // GROUP_SIZE, -(-part.stop // GROUP_SIZE))
        halves = 2 if self.has_half_scales else 1
        codes, scales = self.codes[:, part.start : part.stop], self.scales
        scales = scales[:, halves * groups.start : halves * groups.stop]
        minima = None if self.minima is None else self.minima[:, groups]
        return replace(self, codes=codes, scales=scales, minima=minima)

    def outputs(self, rows: torch.Tensor) -> QuantisedWeight:
        """Some of the outputs, or all in another order: int64 [R]."""
        minima = None if self.minima is None else self.minima[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], minima=minima)

    def dense(self) -> torch.Tensor:
        """float32 [O, I]."""
        num_inputs, scale_size = self.codes.shape[1], GROUP_SIZE // (2 if self.has_half_scales else 1)
        codes = torch.tensor(FP4_DOUBLED)[self.codes.long()] if self.is_fp4 else self.codes.float()
        if self.bits == 4 and self.minima is None and not self.is_fp4:
            codes = codes - 8.0
        values = codes * self.scales.repeat_interleave(scale_size, dim=1)[:, :num_inputs]
        if self.minima is not None:
            values = values + self.minima.repeat_interleave(GROUP_SIZE, dim=1)[:, :num_inputs]
        return values


Weight: TypeAlias = DenseWeight | QuantisedWeight


def stack_outputs(weights: Sequence[Weight]) -> Weight:
    """The outputs of all weights, one after the other; their formats must be alike."""
    if len(weights) == 1:
        return weights[0]
    first = weights[0]
    if isinstance(first, DenseWeight):
        return DenseWeight(torch.cat([w.values for w in weights if isinstance(w, DenseWeight)]))
    parts = [w for w in weights if isinstance(w, QuantisedWeight)]
    minima = [w.minima for w in parts if w.minima is not None]
    return replace(
        first,
        codes=torch.cat([w.codes for w in parts]),
        scales=torch.cat([w.scales for w in parts]),
        minima=torch.cat(minima) if minima else None,
        has_wide_scales=any(w.has_wide_scales for w in parts),
    )


def can_stack(weights: Sequence[Weight]) -> bool:
    """Whether `stack_outputs` takes them: one type, or one number of bits with or without minima."""
    kinds = {(type(w), w.values.dtype if isinstance(w, DenseWeight) else w.layout) for w in weights}
    return len(kinds) == 1


def quantise(values: torch.Tensor, bits: int) -> QuantisedWeight:
    """Round a dense matrix [O, I] to 8 or 4 bits in groups of 32 inputs, to nearest.

    8 bit is symmetric; 4 bit has a minimum. Scales and minima are rounded to float16 first, so that codes fit them.
    """
    num_outputs, num_inputs = values.shape
    num_groups = -(-num_inputs // GROUP_SIZE)
    padded = torch.nn.functional.pad(values.float(), (0, num_groups * GROUP_SIZE - num_inputs))
    groups = padded.view(num_outputs, num_groups, GROUP_SIZE)
    if bits == 8:
        scales = (groups.abs().amax(dim=-1) / 127.0).half().float()
        codes = (groups / scales.clamp(min=1e-30)[..., None]).round_().clamp_(-127, 127)
        minima = None
    else:
        least, most = groups.amin(dim=-1), groups.amax(dim=-1)
        scales, minima = ((most - least) / 15.0).half().float(), least.half().float()
        codes = ((groups - minima[..., None]) / scales.clamp(min=1e-30)[..., None]).round_().clamp_(0, 15)
    codes = codes.to(torch.int8).view(num_outputs, -1)[:, :num_inputs].contiguous()
    return QuantisedWeight(bits, codes, scales, minima)
