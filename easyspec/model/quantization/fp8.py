"""FP8 as DeepSeek publishes it: numbers of eight bits, and a factor for each block of 128 by 128, or for the tensor."""

from __future__ import annotations

from dataclasses import dataclass

from easyspec.model.quantization.scheme import ScaledWeight, StoredTensors, beside, scales_of_blocks


@dataclass(frozen=True)
class Fp8:
    """`block_shape` is None for one scale a tensor."""

    block_shape: tuple[int, int] | None

    def names(self, weight: str, stored: StoredTensors) -> tuple[str, ...]:
        scales = [name for name in beside(weight, "weight_scale_inv", "weight_scale") if name in stored]
        return (weight, scales[0]) if scales else ()

    def read(self, weight: str, stored: StoredTensors) -> ScaledWeight:
        _, scale_name = self.names(weight, stored)
        numbers, scales = stored.stored(weight), stored.stored(scale_name).float()
        if self.block_shape is None:
            return ScaledWeight(numbers, scales.reshape(1, 1) if scales.numel() == 1 else scales.reshape(-1, 1))
        return ScaledWeight(numbers, scales_of_blocks(scales, tuple(numbers.shape), self.block_shape))
