"""The container of every datastore file: named sections of numbers behind a checked header.

Layout, little-endian: magic (8 bytes), format version (u32), length of the header (u32), offset of the header (u64),
CRC-32 of the header (u32), zeros up to 64 bytes; the sections, each at a multiple of 64 bytes; the header, which is
JSON: kind, tokenizer fingerprint, metadata, and of every section offset, length in bytes and CRC-32.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, TypeAlias

from easyspec.errors import ConfigurationError

ItemFormat: TypeAlias = Literal["B", "I", "Q"]

MAGIC = b"EASYSPDS"
FORMAT_VERSION = 1
_PREAMBLE = struct.Struct("<8sIIQI")
_ALIGNMENT = 64


class SectionWriter:
    """Writes a datastore file; it appears under its name only when all of it is on disk.

    A context manager: leaving it normally completes the file, an exception removes what was written.
    """

    def __init__(self, path: Path, kind: str, tokenizer_fingerprint: str) -> None:
        self.metadata: dict[str, Any] = {}
        self._path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._header: dict[str, Any] = {"kind": kind, "tokenizer_fingerprint": tokenizer_fingerprint}
        self._sections: dict[str, dict[str, int]] = {}

    def __enter__(self) -> Self:
        self._file: BinaryIO = self._partial.open("wb")
        self._file.write(bytes(_ALIGNMENT))
        return self

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        offset, crc32 = self._file.tell(), 0
        for chunk in chunks:
            crc32 = zlib.crc32(chunk, crc32)
            self._file.write(chunk)
        self._sections[name] = {"offset": offset, "num_bytes": self._file.tell() - offset, "crc32": crc32}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            return
        header = json.dumps(self._header | {"metadata": self.metadata, "sections": self._sections}).encode()
        offset = self._file.tell()
        self._file.write(header)
        self._file.seek(0)
        self._file.write(_PREAMBLE.pack(MAGIC, FORMAT_VERSION, len(header), offset, zlib.crc32(header)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._partial, self._path)


class SectionReader:
    """An open datastore file. Sections are views of the mapped file: nothing is read before it is used.

    Opening reads the whole file once, to compare its checksums. Raises ConfigurationError for a file that is missing,
    not one of ours, of another kind or version, made with another tokenizer, cut short or changed.
    """

    def __init__(self, path: Path, kind: str, tokenizer_fingerprint: str) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise ConfigurationError(f"datastore file {path} cannot be read: {error}") from error
        self._check(len(self._map) >= _ALIGNMENT, "is not a datastore file")
        magic, version, num_bytes, offset, crc32 = _PREAMBLE.unpack_from(self._map)
        self._check(magic == MAGIC, "is not a datastore file")
        self._check(version == FORMAT_VERSION, f"has format version {version}; read here: {FORMAT_VERSION}")
        raw = self._map[offset : offset + num_bytes]
        self._check(len(raw) == num_bytes and zlib.crc32(raw) == crc32, "is damaged or cut short")
        header: dict[str, Any] = json.loads(raw)
        self._check(header["kind"] == kind, f"is a {header['kind']} file, not a {kind} file")
        made_with, wanted = header["tokenizer_fingerprint"], tokenizer_fingerprint
        difference = f"{made_with[:16]}..., not {wanted[:16]}..."
        self._check(made_with == wanted, f"was made with another tokenizer: {difference}")
        self.metadata: Mapping[str, Any] = header["metadata"]
        self._sections: Mapping[str, Mapping[str, int]] = header["sections"]
        for name, section in self._sections.items():
            is_whole = zlib.crc32(self.section(name, "B")) == section["crc32"]
            self._check(is_whole, f"is damaged in its section {name!r}")

    def section(self, name: str, item_format: ItemFormat) -> memoryview:
        """A section's numbers, by the `struct` format of an item."""
        begin, num_bytes = self._sections[name]["offset"], self._sections[name]["num_bytes"]
        return memoryview(self._map)[begin : begin + num_bytes].cast(item_format)

    def _check(self, is_good: bool, problem: str) -> None:
        if not is_good:
            raise ConfigurationError(f"datastore file {self._path} {problem}; rebuild it with `easyspec index`")
