"""Whether the safetensors files of a checkpoint hold its model, read from their headers alone."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from easyspec.checkpoint.location import weight_bytes
from easyspec.cli.doctor.report import Finding, ok, problem

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20
_LFS_MARK = b"version https://git-lfs"
_AGAIN = "download it again"
_MAX_NAMED = 3
_LOOKING_S = 300.0


@dataclass(frozen=True)
class _BrokenFileError(Exception):
    message: str
    advice: str


def check_weights(name: str, folder: Path) -> Finding:
    """Every file is there and as long as its header says, and together they hold the model of config.json."""
    check = f"{name} weights"
    try:
        expected_files = _files(folder)
        tensors: set[str] = set()
        for path, listed in expected_files.items():
            held = _tensor_names(path)
            if missing := sorted(listed - held):
                more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
                lacking = ", ".join(missing[:_MAX_NAMED]) + more
                raise _BrokenFileError(f"{path.name} lacks {lacking}, which {_INDEX} says it holds", _AGAIN)
            tensors |= held
    except _BrokenFileError as error:
        return problem(check, error.message, error.advice)
    if (why := layout_problem(folder)) is not None:
        return problem(check, why, "get a checkpoint of the whole model, with its own config.json")
    size = weight_bytes(folder) / 2**20
    return ok(check, f"{len(tensors)} tensors in {len(expected_files)} file(s), {size:,.0f} MiB, all whole")


def layout_problem(folder: Path) -> str | None:
    """What the loader has against the files' headers, None if nothing.

    It looks in a process of its own: the other checks must work where torch does not.
    """
    command = [sys.executable, "-m", "easyspec.model.layout", str(folder)]
    try:
        looked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LOOKING_S)
    except subprocess.TimeoutExpired:
        return f"the headers could not be read within {_LOOKING_S:g} s"
    if looked.returncode == 0:
        return None
    last_line = (looked.stdout or looked.stderr).strip().rpartition("\n")[2]
    return last_line or f"looking at it ended with exit code {looked.returncode}"


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files that make up the checkpoint, and the tensors the index promises of each."""
    index = folder / _INDEX
    if not index.is_file():
        single = folder / _SINGLE
        if single.is_file():
            return {single: set()}
        if list(folder.glob("pytorch_model*.bin")):
            raise _BrokenFileError("only pickled weights (pytorch_model.bin)", "convert them to safetensors")
        raise _BrokenFileError(f"neither {_SINGLE} nor {_INDEX} in {folder}", _AGAIN)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str]] = {}
        for tensor, file_name in weight_map.items():
            files.setdefault(folder / file_name, set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _BrokenFileError(f"{_INDEX} is corrupt: {error!r}", _AGAIN) from error
    return files


def _tensor_names(path: Path) -> set[str]:
    """Names in the header of a file that is whole; _BrokenFileError otherwise."""
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if _LFS_MARK.startswith(start) and start:
                raise _BrokenFileError(f"{path.name} is a Git LFS pointer, not the weights", "run `git lfs pull` there")
            (length,) = struct.unpack("<Q", start)
            if length > _MAX_HEADER_BYTES:
                raise ValueError("a header of that size")
            header = json.loads(file.read(length))
        names = {tensor: entry["data_offsets"][1] for tensor, entry in header.items() if tensor != "__metadata__"}
    except FileNotFoundError:
        raise _BrokenFileError(f"{path.name} is missing", _AGAIN) from None
    except OSError as error:
        raise _BrokenFileError(
            f"{path.name} cannot be read: {error.strerror}", "see its owner and permissions"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise _BrokenFileError(f"{path.name} is not a safetensors file", _AGAIN) from error
    expected = 8 + length + max(names.values(), default=0)
    if num_bytes != expected:
        raise _BrokenFileError(f"{path.name} has {num_bytes:,} bytes of {expected:,}", _AGAIN)
    return set(names)
