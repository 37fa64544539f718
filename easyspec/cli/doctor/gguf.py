"""Checks of a GGUF file, read from its header alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from easyspec.checkpoint.gguf_header import GgufHeader, GgufTensor
from easyspec.cli.doctor.report import Finding, ok, problem, warning
from easyspec.errors import ConfigurationError
from easyspec.model.families import BLOCK_FORMATS, GGUF_MODEL_TYPES
from easyspec.model.gguf_blocks import FLOAT_TYPES, format_name, row_bytes


def gguf_config(header: GgufHeader) -> Mapping[str, Any]:
    """What the checks of a pair look at, by the names that config.json has for it."""
    embeddings = header.tensors.get("token_embd.weight")
    return {
        "model_type": GGUF_MODEL_TYPES.get(header.architecture),
        "vocab_size": None if embeddings is None else embeddings.shape[0],
        "max_position_embeddings": header.of_model("context_length"),
    }


def check_gguf(name: str, header: GgufHeader) -> list[Finding]:
    """Architecture, types of tensors, and whether the file is whole."""
    check = f"{name} config"
    if header.architecture not in GGUF_MODEL_TYPES:
        supported = f"use a model of a supported architecture: {', '.join(GGUF_MODEL_TYPES)}"
        return [problem(check, f"general.architecture is {header.architecture!r}", supported)]
    shape = f"{header.of_model('block_count')} layers of {header.of_model('embedding_length')}"
    config = ok(check, f"GGUF, {header.architecture}, {shape}, {header.of_model('context_length')} positions")
    return [config, _check_tensors(f"{name} weights", header)]


def _check_tensors(check: str, header: GgufHeader) -> Finding:
    kinds = Counter(format_name(tensor.kind) for tensor in header.tensors.values())
    if unread := sorted(kinds.keys() - {*FLOAT_TYPES, *BLOCK_FORMATS}):
        allowed = ", ".join((*FLOAT_TYPES, *BLOCK_FORMATS))
        return problem(check, f"tensors are stored as {', '.join(unread)}", f"get the model in one of: {allowed}")
    size = header.path.stat().st_size
    end = max((_end(tensor) for tensor in header.tensors.values()), default=0)
    if end > size:
        return problem(check, f"{header.path.name} has {size:,} bytes of {end:,}", "download it again")
    shown = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
    return ok(check, f"{len(header.tensors)} tensors ({shown}), {size / 2**20:,.0f} MiB, all whole")


def _end(tensor: GgufTensor) -> int:
    num_rows = 1
    for size in tensor.shape[:-1]:
        num_rows *= size
    try:
        return tensor.offset + num_rows * row_bytes(tensor.kind, tensor.shape[-1])
    except ConfigurationError:
        return tensor.offset


def check_gguf_template(name: str, header: GgufHeader, fingerprint: str) -> Finding:
    """Whether conversations can be rendered."""
    if header.chat_template:
        return ok(f"{name} tokenizer", f"fast, fingerprint {fingerprint[:12]}")
    advice = "chat requests will be refused: the file has no tokenizer.chat_template"
    return warning(f"{name} tokenizer", f"fast, fingerprint {fingerprint[:12]}, no chat template", advice)
