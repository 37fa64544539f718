"""Tensors of a checkpoint folder, one safetensors file or many."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from easyspec.errors import ConfigurationError


class TensorSource(Protocol):
    """Where a model's tensors come from; a context manager around their reading."""

    def __enter__(self) -> TensorSource: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...
    def tensor(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """The tensor `name`, which has `shape`, or some of its rows or columns."""


class Checkpoint:
    """Opens the safetensors files of a folder and hands out tensors by name, lazily.

    Raises ConfigurationError for a missing or corrupt file, a missing tensor or an unexpected shape.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = ExitStack()
        self._file_of_tensor: dict[str, Any] = {}
        for path in checkpoint_files(folder):
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ConfigurationError(f"cannot read {path}: {error}") from error
            self._file_of_tensor.update(dict.fromkeys(file.keys(), file))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of_tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of_tensor)

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """The tensor `name`, which must have `shape`, or some of its rows or columns; no more than those is read."""
        if name not in self._file_of_tensor:
            raise ConfigurationError(f"no tensor {name!r} in {self._folder}")
        try:
            stored = self._file_of_tensor[name].get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise ConfigurationError(
                    f"{name!r} in {self._folder} has shape {tuple(stored.get_shape())}; expected {shape}"
                )
            tensor: torch.Tensor = stored[_cut(rows)] if columns is None else stored[_cut(rows), _cut(columns)]
        except SafetensorError as error:
            raise ConfigurationError(f"cannot read {name!r} in {self._folder}: {error}") from error
        return tensor


def _cut(part: range | None) -> slice:
    return slice(None) if part is None else slice(part.start, part.stop)


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; raises ConfigurationError for a missing one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"corrupt {index}: {error}") from error
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    for path in files:
        if not path.is_file():
            raise ConfigurationError(f"missing checkpoint file {path}")
    return files
