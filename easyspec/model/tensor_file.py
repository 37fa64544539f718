"""One safetensors file, read piece by piece.

Not mapped into memory: a mapped file counts as resident as far as it was touched, and the kernel maps whole runs of
pages around what is, so every rank would seem, to its container too, to hold far more than its part.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from easyspec.errors import ConfigurationError

_LENGTH_BYTES = 8
_LFS_MARK = b"version https://git-lfs"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file's header describes it; `offset` is its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorFile:
    """An open file. Raises ConfigurationError where it is not a safetensors file, or cannot be read to the end.

    Without `reads_values` tensors are on torch's device `meta`.
    """

    def __init__(self, path: Path, *, reads_values: bool = True) -> None:
        self.path = path
        self._reads_values = reads_values
        try:
            with path.open("rb") as file:
                is_pointer = file.read(len(_LFS_MARK)) == _LFS_MARK
            if is_pointer:  # what Git leaves in place of a large file
                raise ConfigurationError(
                    f"cannot read {path}: it is a Git LFS pointer; run `git lfs pull` in its folder"
                )
            with safe_open(path, framework="pt"):  # checks the header, and that all tensors are there
                pass
            self._file = path.open("rb", buffering=0)
        except SafetensorError as error:
            raise ConfigurationError(f"cannot read {path}: {error}; download it again") from error
        except OSError as error:
            raise ConfigurationError(f"cannot read {path}: {error}") from error
        self._tensors = self._header()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Call tensors by other names from here on."""
        self._tensors = {new_name(name): stored for name, stored in self._tensors.items()}

    def close(self) -> None:
        self._file.close()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """As the format names it: BF16, F32 and so on."""
        return self._tensors[name].dtype

    def read(self, name: str, rows: range | None = None, columns: range | None = None) -> torch.Tensor:
        """The tensor, or some of its rows (first dimension) or columns (second); no other bytes are read."""
        stored = self._tensors[name]
        if stored.dtype not in _DTYPES:
            allowed = ", ".join(_DTYPES)
            raise ConfigurationError(f"{name!r} in {self.path} has type {stored.dtype}; allowed: {allowed}")
        dtype = _DTYPES[stored.dtype]
        if not self._reads_values:
            return part_of(torch.empty(stored.shape, dtype=dtype, device="meta"), rows, columns)
        num_rows, *row_shape = stored.shape or (1,)
        row_bytes = math.prod(row_shape) * dtype.itemsize
        rows = range(num_rows) if rows is None else rows
        offset = stored.offset + rows.start * row_bytes
        if columns is None:
            part = torch.empty((len(rows), *row_shape), dtype=dtype)
            self._fill(_memory(part), offset)
            return part.reshape(()) if not stored.shape else part
        part = torch.empty((len(rows), len(columns)), dtype=dtype)
        memory, part_bytes = _memory(part), len(columns) * dtype.itemsize
        offset += columns.start * dtype.itemsize
        for index in range(len(rows)):
            self._fill(memory[index * part_bytes : (index + 1) * part_bytes], offset + index * row_bytes)
        return part

    def _fill(self, memory: memoryview, offset: int) -> None:
        while len(memory) > 0:
            try:
                num_bytes = os.preadv(self._file.fileno(), [memory], offset)
            except OSError as error:
                raise ConfigurationError(f"cannot read {self.path}: {error}") from error
            if num_bytes == 0:
                raise ConfigurationError(f"cannot read {self.path}: it ends at byte {offset}")
            memory, offset = memory[num_bytes:], offset + num_bytes

    def _header(self) -> dict[str, StoredTensor]:
        num_bytes = int.from_bytes(self._file.read(_LENGTH_BYTES), "little")
        entries = json.loads(self._file.read(num_bytes))
        start = _LENGTH_BYTES + num_bytes
        return {
            name: StoredTensor(entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
            for name, entry in entries.items()
            if name != "__metadata__"
        }


def part_of(matrix: torch.Tensor, rows: range | None, columns: range | None) -> torch.Tensor:
    """Some rows (first dimension) and columns (second) of a tensor, each all by default."""
    part = matrix if rows is None else matrix[rows.start : rows.stop]
    return part if columns is None else part[:, columns.start : columns.stop]


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to be written."""
    return tensor.flatten().view(torch.uint8).numpy().data
