"""GPTQ and AWQ: integers of four or eight bits in words along the inputs (GPTQ) or the outputs (AWQ) of a matrix that
is stored transposed, with scales and packed zeros for groups of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from easyspec.model.quantization.scheme import GroupedWeight, StoredTensors, beside, unpacked

# AWQ's words hold eight neighbours in this order.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Gptq:
    """With `group_of_column` from g_idx, which act-order (desc_act) makes irregular. The first format of its files
    stores zeros less one."""

    num_bits: int
    stores_zeros_less_one: bool

    def names(self, weight: str, stored: StoredTensors) -> tuple[str, ...]:
        qweight, *others = beside(weight, "qweight", "qzeros", "scales", "g_idx")
        return (qweight, *(name for name in others if name in stored)) if qweight in stored else ()

    def read(self, weight: str, stored: StoredTensors) -> GroupedWeight:
        qweight, qzeros, scale_name, g_idx = beside(weight, "qweight", "qzeros", "scales", "g_idx")
        codes = unpacked(stored.stored(qweight).T.contiguous(), self.num_bits)  # [R, C]
        scales = stored.stored(scale_name).float().T.contiguous()  # [R, G]
        zeros = unpacked(stored.stored(qzeros), self.num_bits)[:, : scales.shape[0]].T.float()  # [R, G]
        if self.stores_zeros_less_one:  # in as many bits: 15 stands for 0
            zeros = (zeros + 1) % 2**self.num_bits
        groups = stored.stored(g_idx).long() if g_idx in stored else None
        size = codes.shape[1] // scales.shape[1]
        if groups is not None and torch.equal(groups, torch.arange(codes.shape[1]) // size):
            groups = None
        return GroupedWeight(self.num_bits, codes, scales, zeros.contiguous(), groups)


@dataclass(frozen=True)
class Awq:
    """Four bits, in the layout called gemm."""

    def names(self, weight: str, stored: StoredTensors) -> tuple[str, ...]:
        found = beside(weight, "qweight", "qzeros", "scales")
        return found if found[0] in stored else ()

    def read(self, weight: str, stored: StoredTensors) -> GroupedWeight:
        qweight, qzeros, scales = (stored.stored(name) for name in beside(weight, "qweight", "qzeros", "scales"))
        codes, zeros = (
            unpacked(words, 4).unflatten(1, (-1, len(_AWQ_PLACES)))[:, :, _AWQ_PLACES].flatten(1).T.contiguous()
            for words in (qweight, qzeros)
        )
        return GroupedWeight(4, codes, scales.float().T.contiguous(), zeros.float())
