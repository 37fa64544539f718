"""Tensors of a checkpoint folder, one safetensors file or many."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from easyspec.errors import ConfigurationError
from easyspec.model.tensor_file import TensorFile


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
        self._file_of_tensor: dict[str, TensorFile] = {}
        with ExitStack() as stack:
            for path in checkpoint_files(folder):
                file = stack.enter_context(closing(TensorFile(path)))
                self._file_of_tensor.update(dict.fromkeys(file, file))
            self._stack = stack.pop_all()

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
        file = self._file_of_tensor[name]
        if file.shape(name) != shape:
            raise ConfigurationError(f"{name!r} in {self._folder} has shape {file.shape(name)}; expected {shape}")
        return file.read(name, rows, columns)


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
