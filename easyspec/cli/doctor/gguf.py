"""Checks of a GGUF file, read from its header alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyspec.checkpoint.gguf_header import GgufHeader, GgufTensor, read_header
from easyspec.cli.doctor.report import Finding, ok, problem, warning
from easyspec.errors import ConfigurationError
from easyspec.model.gguf_blocks import FLOAT_TYPES, format_name, row_bytes
from easyspec.model.supported_models import BLOCK_FORMATS, GGUF_MODEL_TYPES
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint


def check_gguf_file(name: str, file: Path) -> tuple[Mapping[str, Any], list[Finding]]:
    """Architecture, types of tensors, whether the file is whole, and its tokenizer; with it what the checks of a pair
    look at, by the names that config.json has for it."""
    check = f"{name} config"
    try:
        header = read_header(file)
    except ConfigurationError as error:
        return {}, [problem(check, str(error), "download it again, or name another file")]
    positions = header.of_model("context_length")
    if header.architecture not in GGUF_MODEL_TYPES:
        supported = f"use a model of a supported architecture: {', '.join(GGUF_MODEL_TYPES)}"
        findings = [problem(check, f"general.architecture is {header.architecture!r}", supported)]
    else:
        shape = f"{header.of_model('block_count')} layers of {header.of_model('embedding_length')}"
        summary = f"GGUF, {header.architecture}, {shape}, {positions} positions"
        findings = [ok(check, summary), _check_tensors(f"{name} weights", header)]
    findings.append(_check_tokenizer(f"{name} tokenizer", header))
    embeddings = header.tensors.get("token_embd.weight")
    config = {
        "model_type": GGUF_MODEL_TYPES.get(header.architecture),
        "vocab_size": None if embeddings is None else embeddings.shape[0],
        "max_position_embeddings": positions,
    }
    return config, findings


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
    try:
        return tensor.offset + math.prod(tensor.shape[:-1]) * row_bytes(tensor.kind, tensor.shape[-1])
    except ConfigurationError:
        return tensor.offset


def _check_tokenizer(check: str, header: GgufHeader) -> Finding:
    try:
        message = f"fast, fingerprint {tokenizer_fingerprint(header.path)[:12]}"
    except ConfigurationError as error:
        return problem(check, str(error), "get a file with a tokenizer in it")
    advice = "chat requests will be refused: the file has no tokenizer.chat_template"
    return ok(check, message) if header.chat_template else warning(check, f"{message}, no chat template", advice)
