"""A weight matrix as a quantized checkpoint stores it, for engines that compute with it as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class StoredBlocks:
    """A matrix of `shape` [R, C] in `format`, and the arrays it consists of.

    uint4, uint8: groups of columns with a scale and a zero; a value is scale * (code - zero). `codes`: uint8 [R, C],
    one a byte; `scales`, `zeros`: float32 [R, G]; `group_of_column`: int64 [C], only where groups do not come one
    after the other.
    MXFP4: `codes`: uint8 [R, C], one a byte; `exponents`: uint8 [R, C / 32].
    Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K: ggml's formats. `blocks`: uint8 [R, bytes of a row].
    """

    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, NDArray[Any]]
