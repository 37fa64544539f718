"""The types of tensors in GGUF files: which are read, how large their blocks are, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from easyspec.errors import ConfigurationError

# Types that hold numbers as they are, with the names that configurations have for them.
FLOAT_TYPES: Mapping[str, str] = MappingProxyType({"F32": "float32", "F16": "float16", "BF16": "bfloat16"})


def format_name(kind: int) -> str:
    """ggml's name of a type, or its number if this version of the `gguf` package does not know it."""
    try:
        return GGMLQuantizationType(kind).name
    except ValueError:
        return f"type {kind}"


def row_bytes(kind: int, num_columns: int) -> int:
    """Bytes of a row of values of a supported type; raises ConfigurationError unless it is of whole blocks."""
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if num_columns % block_size != 0:
        raise ConfigurationError(f"rows of {num_columns} values do not consist of blocks of {block_size}")
    return num_columns // block_size * block_bytes


def dequantized(blocks: NDArray[np.uint8], kind: int) -> NDArray[np.float32]:
    """The values of rows of blocks [R, row_bytes], as float32 [R, C]."""
    values: NDArray[np.float32] = dequantize(blocks, GGMLQuantizationType(kind))
    return values
