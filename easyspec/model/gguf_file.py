"""The tensors of a GGUF file, by their Hugging Face names and in Hugging Face's order of rows.

Mapped into memory: several processes that read one file share its pages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from easyspec.checkpoint.gguf_header import GgufTensor, read_header
from easyspec.errors import ConfigurationError
from easyspec.model.gguf_blocks import FLOAT_TYPES, dequantized, format_name, row_bytes
from easyspec.model.gguf_families import family_of
from easyspec.model.stored_blocks import StoredBlocks
from easyspec.model.supported_models import BLOCK_FORMATS
from easyspec.model.weights import check_finite

_NAMES: Mapping[str, str] = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)
# What a tensor of a layer is for, as TensorNames calls it.
_ROLES: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_norm",
        "ffn_norm": "mlp_norm",
        "attn_q": "query",
        "attn_k": "key",
        "attn_v": "value",
        "attn_qkv": "qkv",
        "attn_output": "output",
        "attn_q_norm": "query_norm",
        "attn_k_norm": "key_norm",
        "attn_sinks": "sinks",
        "ffn_gate": "gate",
        "ffn_up": "up",
        "ffn_down": "down",
        "ffn_gate_inp": "router",
    }
)
_EXPERT_ROLES: Mapping[str, str] = MappingProxyType(
    {"ffn_gate_exps": "expert_gate", "ffn_up_exps": "expert_up", "ffn_down_exps": "expert_down"}
)
_LAYER_TENSOR = re.compile(r"blk\.(?P<layer>\d+)\.(?P<name>\w+)\.(?P<kind>weight|bias)")
# Read with the configuration.
_NEEDLESS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class GgufCheckpoint:
    """Hands out tensors by name, lazily; a TensorSource.

    Raises ConfigurationError for a file that is damaged, types that are not read, a missing tensor, an unexpected
    shape, and NaN or infinity. With `is_whole` also, at the end, for a tensor that was never asked for.
    """

    def __init__(self, path: Path, *, is_whole: bool = False) -> None:
        self._path = path
        self._is_whole = is_whole
        self._header = header = read_header(path)
        self._bytes: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        family = family_of(header)
        if family is None:
            raise ConfigurationError(f"general.architecture is {header.architecture!r} in {path}")
        self._family = family
        self._tensors = dict(self._named(header.tensors.values()))
        self._asked: set[str] = set()
        for tensor in header.tensors.values():
            self._check(tensor)

    def __enter__(self) -> GgufCheckpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """The map goes when the last view of it does."""
        if self._is_whole and error is None:
            left = sorted(
                tensor.name
                for name, tensor in self._tensors.items()
                if name not in self._asked and tensor.name not in _NEEDLESS
            )
            if left:
                more = f" and {len(left) - 1} more are" if len(left) > 1 else " is"
                raise ConfigurationError(
                    f"{left[0]!r} in {self._path}{more} not used: a model of the architecture "
                    f"{self._header.architecture!r} has no such part here, and would be wrong without it"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def tensor(
        self, name: str, shape: tuple[int, ...], rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """The tensor `name`, which must have `shape`, or some of its rows or columns; blocks become float32."""
        stored = self._stored(name, shape)
        raw = self._rows(name, stored, rows)
        if (float_type := FLOAT_TYPES.get(format_name(stored.kind))) is not None:
            values = torch.from_numpy(np.array(raw)).view(getattr(torch, float_type))
        else:
            values = torch.from_numpy(dequantized(raw, stored.kind))
        if len(shape) == 1:
            values = values.flatten()
            if self._family.adds_one and name.endswith("norm.weight"):
                values = values - 1.0
        if columns is not None:
            values = values[:, columns.start : columns.stop]
        check_finite(values, stored.name, self._path)
        return values.contiguous()

    def blocks(self, name: str, shape: tuple[int, ...], rows: range | None = None) -> StoredBlocks | None:
        """The blocks of `name`, or of some of its rows, as they stand in the file; None if it has none.

        They are a view of the mapped file, except where rows stand in another order there.
        """
        stored = self._stored(name, shape)
        format_ = format_name(stored.kind)
        if format_ not in BLOCK_FORMATS:
            return None
        raw = self._rows(name, stored, rows)
        return StoredBlocks(format_, (len(raw), *shape[1:]), {"blocks": raw})

    def _named(self, tensors: Iterable[GgufTensor]) -> Iterator[tuple[str, GgufTensor]]:
        """Tensors with their Hugging Face names, or their own where they have none."""
        names, roles = self._family.names, {**_ROLES, **self._family.roles}
        for tensor in tensors:
            found = _LAYER_TENSOR.fullmatch(tensor.name)
            stem, _, kind = tensor.name.partition(".")
            if found is None:
                yield f"{_NAMES[stem]}.{kind}" if stem in _NAMES else tensor.name, tensor
                continue
            prefix, name, kind = f"model.layers.{int(found['layer'])}.", found["name"], found["kind"]
            if name in _EXPERT_ROLES:
                part, shape = getattr(names, _EXPERT_ROLES[name]), tensor.shape[1:]
                num_bytes = math.prod(shape[:-1]) * row_bytes(tensor.kind, tensor.shape[-1])
                for number in range(tensor.shape[0]):
                    expert = replace(tensor, shape=shape, offset=tensor.offset + number * num_bytes)
                    yield f"{prefix}{names.of_expert(number, part)}.{kind}", expert
            elif roles.get(name) == "sinks":
                yield prefix + names.sinks, tensor
            else:
                own = getattr(names, roles[name], None) if name in roles else None
                yield f"{prefix}{own}.{kind}" if own else tensor.name, tensor

    def _stored(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        if name not in self._tensors:
            raise ConfigurationError(f"no tensor {name!r} in {self._path}")
        self._asked.add(name)
        stored = self._tensors[name]
        if stored.shape != shape:
            raise ConfigurationError(f"{stored.name!r} in {self._path} has shape {stored.shape}; expected {shape}")
        return stored

    def _rows(self, name: str, stored: GgufTensor, rows: range | None) -> NDArray[np.uint8]:
        """Bytes of rows in Hugging Face's order, [R, row_bytes]; a vector is one row."""
        is_vector = len(stored.shape) == 1
        num_rows, num_bytes = (1 if is_vector else stored.shape[0]), row_bytes(stored.kind, stored.shape[-1])
        start = stored.offset
        raw = self._bytes[start : start + num_rows * num_bytes].reshape(num_rows, num_bytes)
        if is_vector:  # of numbers, each of which is a row where rows are asked for
            raw = raw.reshape(stored.shape[0], -1)
        order = self._order(name, len(raw))
        if order is not None:
            return raw[order if rows is None else order[rows.start : rows.stop]]
        return raw if rows is None else raw[rows.start : rows.stop]

    def _order(self, name: str, num_rows: int) -> NDArray[np.int64] | None:
        """For each row in Hugging Face's order, its place in the file; None where they are the same.

        llama.cpp turns neighbouring dimensions against each other in models of some architectures, Hugging Face
        dimension i against i + D/2: the converter puts rows of queries and keys in the former's order.
        """
        projection = name.rpartition(".")[0].rpartition(".")[2]
        if not self._family.has_paired_rows or projection not in ("q_proj", "k_proj"):
            return None
        num_query_heads = int(self._header.of_model("attention.head_count"))
        num_heads = num_query_heads
        if projection == "k_proj":
            num_heads = int(self._header.of_model("attention.head_count_kv", num_query_heads))
        pairs = np.arange(num_rows).reshape(num_heads, -1, 2)  # [H, D / 2, 2]
        return pairs.swapaxes(1, 2).reshape(-1)

    def _check(self, tensor: GgufTensor) -> None:
        format_ = format_name(tensor.kind)
        if format_ not in FLOAT_TYPES and format_ not in BLOCK_FORMATS:
            raise ConfigurationError(
                f"{tensor.name!r} in {self._path} is stored as {format_}; supported: "
                f"{', '.join((*FLOAT_TYPES, *BLOCK_FORMATS))}: get the model in one of these"
            )
        if len(tensor.shape) == 1 and format_ not in FLOAT_TYPES:
            raise ConfigurationError(f"{tensor.name!r} in {self._path} is a vector stored as {format_}")
        num_rows = 1 if len(tensor.shape) == 1 else int(np.prod(tensor.shape[:-1]))
        end = tensor.offset + num_rows * row_bytes(tensor.kind, tensor.shape[-1])
        if end > len(self._bytes):
            raise ConfigurationError(
                f"cannot read {self._path}: it has {len(self._bytes)} bytes, and {tensor.name!r} ends at {end}; "
                "download it again"
            )
