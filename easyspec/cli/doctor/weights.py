"""Whether the safetensors files of a checkpoint are whole, read from their headers alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyspec.checkpoint.location import weight_bytes
from easyspec.cli.doctor.report import Finding, ok, problem

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20
_LFS_MARK = b"version https://git-lfs"
_AGAIN = "download it again"
_MAX_NAMED = 3
# Families whose layers hold just these.
_PLAIN_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_LAYER_TENSORS = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)


@dataclass(frozen=True)
class _BrokenFileError(Exception):
    message: str
    advice: str


def check_weights(name: str, folder: Path, config: Mapping[str, Any]) -> Finding:
    """Every file is there and as long as its header says, and holds every tensor that the configuration calls for."""
    check = f"{name} weights"
    try:
        expected_files = _files(folder)
        tensors: set[str] = set()
        for path, listed in expected_files.items():
            held = _tensor_names(path)
            if missing := sorted(listed - held):
                raise _BrokenFileError(f"{path.name} lacks {_some(missing)}, which {_INDEX} says it holds", _AGAIN)
            tensors |= held
    except _BrokenFileError as error:
        return problem(check, error.message, error.advice)
    if config.get("model_type") not in _PLAIN_FAMILIES:
        return _check_layers(check, folder, config, tensors, len(expected_files))
    wanted = _wanted(config)
    if config.get("quantization_config") is not None:  # matrices go by other names there
        wanted = {name for name in wanted if "_proj." not in name}
    if missing := sorted(wanted - tensors):
        return problem(check, f"no tensor {_some(missing)}", "get a checkpoint of the whole model, not of an adapter")
    return _whole(check, folder, len(tensors), len(expected_files))


def _check_layers(check: str, folder: Path, config: Mapping[str, Any], tensors: set[str], num_files: int) -> Finding:
    """What can be said without knowing a family's names: that no layer is missing altogether."""
    text = config.get("text_config", config)
    num_layers = text.get("num_hidden_layers", 0) if isinstance(text, Mapping) else 0
    held = {part for name in tensors if ".layers." in name for part in name.split(".layers.")[1].split(".")[:1]}
    missing = [f"layers.{layer}" for layer in range(num_layers) if str(layer) not in held]
    if missing:
        return problem(
            check, f"no tensor of {_some(missing)}", "get a checkpoint of the whole model, not of an adapter"
        )
    return _whole(check, folder, len(tensors), num_files)


def _whole(check: str, folder: Path, num_tensors: int, num_files: int) -> Finding:
    size = weight_bytes(folder) / 2**20
    return ok(check, f"{num_tensors} tensors in {num_files} file(s), {size:,.0f} MiB, all whole")


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


def _wanted(config: Mapping[str, Any]) -> set[str]:
    num_layers = config.get("num_hidden_layers", 0)
    layers = range(num_layers if isinstance(num_layers, int) else 0)
    wanted = {f"model.layers.{layer}.{tensor}" for layer in layers for tensor in _LAYER_TENSORS}
    wanted |= {"model.embed_tokens.weight", "model.norm.weight"}
    return wanted if config.get("tie_word_embeddings") else wanted | {"lm_head.weight"}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
