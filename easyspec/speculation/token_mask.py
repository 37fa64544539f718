"""Packed sets of tokens over rows of logits.

Dimension key: `R` rows, `M` masked rows, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from easyspec.speculation.transfer import moved, to_device


def mask_forbidden_(logits: Tensor, rows: Sequence[int], allowed_bits: Sequence[NDArray[np.uint8]]) -> None:
    """Set the tokens of `rows` that are not in their sets to -inf; `logits` is float32 [R, V].

    A set has bit `i % 8` of byte `i // 8` for token i, [ceil(V / 8)], one set per entry of `rows`.
    """
    device, vocab_size = logits.device, logits.shape[1]
    # Unpacked on the host, which takes a third of the time of torch's operations; a row is only V bytes.
    allowed = np.unpackbits(np.stack(allowed_bits), axis=1, count=vocab_size, bitorder="little")  # [M, V]
    forbidden = moved(torch.from_numpy(allowed == 0), device)
    if len(rows) == len(logits):
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        index = to_device(rows, torch.int64, device)
        logits[index] = logits[index].masked_fill_(forbidden, -torch.inf)
