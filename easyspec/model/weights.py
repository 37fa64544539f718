"""Tensors of a checkpoint folder, one safetensors file or many; what would make a model speak nonsense is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from easyspec.errors import ConfigurationError
from easyspec.model.quantization.scheme import GroupedWeight, Quantization, ScaledWeight
from easyspec.model.stored_blocks import StoredBlocks
from easyspec.model.tensor_file import TensorFile, part_of

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
# Tables that the config gives as well, and a head that the config says is the embeddings'.
_NEEDLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq|lm_head\.weight")
# Of models of text and pictures: what the text tower's tensors are called, and the other parts.
_TEXT_TOWERS = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "model.language_model.": "model.",
}
_OTHER_PARTS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
# Of what is computed besides, which quantized checkpoints may scale too: here it is not rounded.
_ACTIVATION_SCALE = re.compile(
    r".*\.(input_scale|output_scale|[kvq]_scale|input_zero_point|output_zero_point|activation_scale)"
)
_QUANTIZED = re.compile(r".*(scale|scale_inv|zeros|zero_point|qweight|g_idx|_packed|absmax|quant_map|SCB)$")


class TensorSource(Protocol):
    """Where a model's tensors come from; a context manager around their reading."""

    def __enter__(self) -> TensorSource: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None: ...
    def tensor(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """The tensor `name`, which has `shape`, or some of its rows or columns, as numbers of a floating-point type."""

    def blocks(self, name: str, shape: tuple[int, ...], rows: range | None = None) -> StoredBlocks | None:
        """The same as it is stored, where it is quantized; None where it is not."""


class Checkpoint:
    """Opens the safetensors files of a folder and hands out tensors by name, lazily.

    Raises ConfigurationError for a missing or corrupt file, a missing tensor or an unexpected shape, for weights of
    a type that stands for something else, and for NaN and infinity. With `is_whole` also, at the end, for a tensor
    that was never asked for: it belongs to another model than config.json describes. `quantization` says what the
    tensors of a quantized layer stand for. Without `reads_values` only headers are read, and tensors are on torch's
    device `meta`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        is_whole: bool = False,
        quantization: Quantization | None = None,
        reads_values: bool = True,
    ) -> None:
        self.reads_values = reads_values
        self._folder = folder
        self._quantization = quantization
        self._is_whole = is_whole
        self._asked: set[str] = set()
        self._file_of_tensor: dict[str, TensorFile] = {}
        self._is_text_tower = False
        with ExitStack() as stack:
            for path, listed in _files(folder).items():
                file = stack.enter_context(closing(TensorFile(path, reads_values=reads_values)))
                _check_listed(path, listed, file)
                self._is_text_tower = self._is_text_tower or any(name.startswith(tuple(_TEXT_TOWERS)) for name in file)
                file.rename(_text_name)
                self._file_of_tensor.update(dict.fromkeys(file, file))
            self._stack = stack.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()
        if self._is_whole and error is None:
            self._check_all_asked()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of_tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of_tensor)

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """The tensor `name`, which must have `shape`, or some of its rows or columns; no more than those is read."""
        if not self.reads_values and self._quantized_names(name):
            return part_of(torch.empty(shape, device="meta"), rows, columns)
        if (weight := self._quantized(name, shape)) is not None:
            values = part_of(weight.values(), rows, columns)
            check_finite(values, name, self._folder)
            return values.contiguous()
        file = self._file_of(name)
        if file.dtype(name) not in _WEIGHT_TYPES:
            raise ConfigurationError(
                f"{name!r} in {file.path} is stored as {file.dtype(name)}, and config.json does not say what that "
                f"stands for; allowed: {', '.join(_WEIGHT_TYPES)}, or a quantization_config that the writer of the "
                "weights left out: get the checkpoint again, with its config.json"
            )
        if file.shape(name) != shape:
            raise ConfigurationError(f"{name!r} in {self._folder} has shape {file.shape(name)}; expected {shape}")
        tensor = file.read(name, rows, columns)
        check_finite(tensor, name, file.path)
        return tensor

    def blocks(self, name: str, shape: tuple[int, ...], rows: range | None = None) -> StoredBlocks | None:
        """The codes of a quantized layer, or of some of its rows; None where it has none, or is not read."""
        weight = self._quantized(name, shape) if self.reads_values else None
        packed = None if weight is None else weight.blocks()
        if packed is None or rows is None:
            return packed
        cut = {
            part: values if part == "group_of_column" else values[rows.start : rows.stop]
            for part, values in packed.parts.items()
        }
        return StoredBlocks(packed.format, (len(rows), *shape[1:]), cut)

    def stored(self, name: str, shape: tuple[int, ...] | None = None, rows: range | None = None) -> torch.Tensor:
        """A tensor, or some of its rows, in the type it is stored in.

        Raises ConfigurationError if it is missing, or has another `shape` where one is given.
        """
        file = self._file_of(name)
        if shape is not None and file.shape(name) != shape:
            raise ConfigurationError(f"{name!r} in {self._folder} has shape {file.shape(name)}; expected {shape}")
        return file.read(name, rows)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file_of_tensor[name].shape(name)

    def _file_of(self, name: str) -> TensorFile:
        if name not in self._file_of_tensor:
            raise ConfigurationError(f"no tensor {name!r} in {self._folder}")
        self._asked.add(name)
        return self._file_of_tensor[name]

    def _quantized(self, name: str, shape: tuple[int, ...]) -> GroupedWeight | ScaledWeight | None:
        """What the tensors of a quantized layer stand for; None where `name` is stored as it is."""
        names = self._quantized_names(name)
        if self._quantization is None or not names:
            return None
        try:
            weight = self._quantization.read(name, self)
            found = tuple((weight.numbers if isinstance(weight, ScaledWeight) else weight.codes).shape)
        except (RuntimeError, ValueError, IndexError) as error:  # shapes that do not belong together
            raise ConfigurationError(
                f"{names[0]!r} in {self._folder} does not fit the others of its layer: {error}"
            ) from error
        if found != shape:
            raise ConfigurationError(f"{names[0]!r} in {self._folder} stands for shape {found}; expected {shape}")
        return weight

    def _quantized_names(self, name: str) -> tuple[str, ...]:
        names = () if self._quantization is None else self._quantization.names(name, self)
        self._asked.update(names)
        return names

    def _check_all_asked(self) -> None:
        left = sorted(name for name in self._file_of_tensor.keys() - self._asked if not _NEEDLESS.fullmatch(name))
        if self._is_text_tower:
            left = [name for name in left if not _OTHER_PARTS.fullmatch(name)]
        if self._quantization is not None:
            left = [name for name in left if not _ACTIVATION_SCALE.fullmatch(name)]
        if not left:
            return
        more = f" and {len(left) - 1} more are" if len(left) > 1 else " is"
        if any(_QUANTIZED.fullmatch(name) for name in left):
            advice = "the weights are quantized in a way that config.json does not announce"
        else:
            advice = "it describes another model: get the config.json that came with the weights"
        path = self._file_of_tensor[left[0]].path
        raise ConfigurationError(f"{left[0]!r} in {path}{more} not used by the model of config.json; {advice}")


def _text_name(name: str) -> str:
    """What a tensor of a text tower is called in a model of text alone."""
    for stem, own in _TEXT_TOWERS.items():
        if name.startswith(stem):
            return own + name.removeprefix(stem)
    return name


def check_finite(tensor: torch.Tensor, name: str, path: Path) -> None:
    """Raise ConfigurationError for NaN or infinity in a tensor read from `path`."""
    if tensor.numel() == 0 or tensor.is_meta:
        return
    low, high = torch.aminmax(tensor)  # both are NaN if one value is
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ConfigurationError(
            f"{name!r} in {path} has values that are not numbers (NaN or infinity), as an overflow in float16 leaves; "
            "every answer would be empty: get the weights again, or in bfloat16"
        )


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; raises ConfigurationError for a missing one."""
    return [*_files(folder)]


def _files(folder: Path) -> Mapping[Path, frozenset[str]]:
    """The files of a checkpoint, each with the tensors that the index says it holds, none where there is no index."""
    index = folder / _INDEX
    if index.exists():
        files: dict[Path, set[str]] = {}
        try:
            for tensor, name in json.loads(index.read_text())["weight_map"].items():
                files.setdefault(folder / name, set()).add(tensor)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"corrupt {index}: {error}") from error
        found = {path: frozenset(files[path]) for path in sorted(files)}
    else:
        found = {folder / _SINGLE: frozenset()}
    for path in found:
        if not path.is_file():
            raise ConfigurationError(f"missing checkpoint file {path}{_way_out(folder)}")
    return found


def _way_out(folder: Path) -> str:
    """What helps where weights are missing, as far as the other files tell."""
    if pickled := sorted(folder.glob("*.bin")):
        return (
            f"; {pickled[0].name} holds pickled weights, which may run any program and are not read: convert them "
            "with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    if (folder / _INDEX).exists() and (folder / _SINGLE).is_file():
        return f"; {_INDEX} is left from other weights than {_SINGLE}: remove it"
    return ""


def _check_listed(path: Path, listed: frozenset[str], file: TensorFile) -> None:
    """Raise ConfigurationError unless the file holds what the index says, and nothing else."""
    held = frozenset(file)
    if not listed or held == listed:
        return
    name = min(held ^ listed)
    why = f"lacks {name!r}, which it should hold" if name in listed else f"holds {name!r}, which it does not list"
    raise ConfigurationError(
        f"{path} {why} by {_INDEX}: the index is of other files; get both again, or remove an index of a single file"
    )
