"""Checks of the base and the draft checkpoint: each alone, and whether they fit together. Loads no weights."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from easyspec.checkpoint.gguf_header import GgufHeader, GgufTensor, read_header
from easyspec.checkpoint.location import is_gguf, weight_bytes
from easyspec.cli.doctor.report import Finding, ok, problem, warning
from easyspec.errors import ConfigurationError
from easyspec.model.gguf_blocks import FLOAT_TYPES, format_name, row_bytes
from easyspec.model.supported_models import (
    BLOCK_FORMATS,
    GGUF_MODEL_TYPES,
    QUANTIZATION_METHODS,
    SUPPORTED_ACTIVATIONS,
    SUPPORTED_MODEL_TYPES,
)
from easyspec.tokenizer_fingerprint import read_vocabulary, tokenizer_fingerprint
from easyspec.vocabulary import differing_ids

_LOOKING_S = 300.0
_MAX_DIFFERENCES = 3


def checkpoint_findings(base: Path, draft: Path | None) -> list[Finding]:
    findings: list[Finding] = []
    configs: list[Mapping[str, Any]] = []  # empty where none can be read
    folders = [base] if draft is None else [base, draft]
    for name, folder in zip(("base", "draft"), folders, strict=False):
        if is_gguf(folder) and folder.is_file():
            config, gguf_findings = _check_gguf_file(name, folder)
            findings += gguf_findings
        else:
            config, finding = _check_config(name, folder)
            findings.append(finding)
            if folder.is_dir():
                findings += [_check_weights(name, folder), _check_tokenizer_folder(name, folder)]
        configs.append(config)
    if draft is not None and base.exists() and draft.exists():
        findings += _check_pair(base, draft, *configs)
    return findings


def _check_config(name: str, folder: Path) -> tuple[Mapping[str, Any], Finding]:
    check = f"{name} config"
    if not folder.is_dir():
        advice = "name a checkpoint folder, a .gguf file, or a hub id that can be fetched"
        return {}, problem(check, f"{folder} is neither a folder, nor a .gguf file, nor a hub id", advice)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, problem(check, f"no usable config.json in {folder}: {error!r}", "name the folder of a checkpoint")
    # What the decoder says at start-up, told before.
    activation, method = config.get("hidden_act", "silu"), (config.get("quantization_config") or {}).get("quant_method")
    is_quantized = config.get("quantization_config") is not None
    for name_of, value, is_supported in (
        ("model_type", model_type, model_type in SUPPORTED_MODEL_TYPES),
        ("hidden_act", activation, activation in SUPPORTED_ACTIVATIONS),
        ("quant_method", method, not is_quantized or method in QUANTIZATION_METHODS),
    ):
        if not is_supported:
            advice = f"use a checkpoint of a supported family: {', '.join(SUPPORTED_MODEL_TYPES)}"
            return config, problem(check, f"{name_of} is {value!r}", advice)
    shape = f"{config.get('num_hidden_layers')} layers of {config.get('hidden_size')}"
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    drafting = ", drafts all levels in one pass (PARD)" if config.get("pard_token") is not None else ""
    text = f"{model_type}, {shape}, {dtype}, {config.get('max_position_embeddings')} positions{drafting}"
    return config, ok(check, text)


def _check_gguf_file(name: str, file: Path) -> tuple[Mapping[str, Any], list[Finding]]:
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
    without_template = "chat requests will be refused: the file has no tokenizer.chat_template"
    advice = "get a file with a tokenizer in it"
    findings.append(_check_tokenizer(name, file, advice, None if header.chat_template else without_template))
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


def _check_tokenizer_folder(name: str, folder: Path) -> Finding:
    has_template = (folder / "chat_template.jinja").is_file()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        of_tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        has_template = has_template or bool(of_tokenizer.get("chat_template"))
    without_template = None
    if name == "base" and not has_template:
        without_template = "chat requests will be refused; add the model's chat_template.jinja if it has one"
    advice = "only fast tokenizers are supported: save one with AutoTokenizer.from_pretrained(...).save_pretrained"
    return _check_tokenizer(name, folder, advice, without_template)


def _check_tokenizer(name: str, path: Path, advice: str, without_template: str | None) -> Finding:
    """`advice` is for a tokenizer that cannot be used, `without_template` for one that has no chat template."""
    try:
        message = f"fast, fingerprint {tokenizer_fingerprint(path)[:12]}"
    except ConfigurationError as error:
        return problem(f"{name} tokenizer", str(error), advice)
    if without_template is None:
        return ok(f"{name} tokenizer", message)
    return warning(f"{name} tokenizer", f"{message}, no chat template", without_template)


def _check_pair(
    base: Path, draft: Path, base_config: Mapping[str, Any], draft_config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Whether the draft can guess for the base, and whether that can pay."""
    yield _check_vocabularies(base, draft, base_config.get("vocab_size"), draft_config.get("vocab_size"))
    base_bytes, draft_bytes = weight_bytes(base), weight_bytes(draft)
    if base_bytes and draft_bytes >= base_bytes:
        message = f"the draft's weights are {draft_bytes / base_bytes:.1f} times the base's"
        yield warning("pair size", message, "a draft pays only if it is much smaller; swap the two?")
    elif base_bytes:
        yield ok("pair size", f"the base is {base_bytes / max(draft_bytes, 1):.1f} times the draft")
    base_context, draft_context = (config.get("max_position_embeddings") for config in (base_config, draft_config))
    if isinstance(base_context, int) and isinstance(draft_context, int) and draft_context < base_context:
        message = f"the draft has {draft_context} positions, the base {base_context}"
        advice = f"nothing is guessed after position {draft_context}; a draft with a longer context guesses on"
        yield warning("pair context", message, advice)


def _check_vocabularies(base: Path, draft: Path, base_size: object, draft_size: object) -> Finding:
    check = "pair tokenizer"
    try:
        is_equal = tokenizer_fingerprint(base) == tokenizer_fingerprint(draft)
    except ConfigurationError:
        return problem(check, "cannot be compared", "see the tokenizers above")
    if not is_equal:
        advice = "use a draft with the base's tokenizer, usually a smaller model of the same family and release"
        return problem(check, "; ".join(_explain_difference(base, draft)), advice)
    if base_size != draft_size:
        return ok(check, f"equal; embeddings of {base_size} and {draft_size} entries differ only by padding")
    return ok(check, "equal")


def _explain_difference(base: Path, draft: Path) -> Iterator[str]:
    """Where two tokenizers part: the first entries by id, then merges. Raises ConfigurationError for no tokenizer."""
    base_tokens, base_merges = read_vocabulary(base)
    draft_tokens, draft_merges = read_vocabulary(draft)
    if differing := differing_ids(base_tokens, draft_tokens):
        shown = ", ".join(
            f"id {token_id} is {_shown(base_tokens, token_id)} in base and {_shown(draft_tokens, token_id)} in draft"
            for token_id in differing[:_MAX_DIFFERENCES]
        )
        yield f"{len(differing)} of {max(len(base_tokens), len(draft_tokens))} entries differ: {shown}"
    if base_merges != draft_merges:
        same = next((i for i, (a, b) in enumerate(zip(base_merges, draft_merges, strict=False)) if a != b), None)
        where = f"from number {same} on" if same is not None else f"in number: {len(base_merges)}, {len(draft_merges)}"
        yield f"merges differ {where}"


def _shown(tokens: Mapping[int, str], token_id: int) -> str:
    return repr(tokens[token_id]) if token_id in tokens else "missing"


def _check_weights(name: str, folder: Path) -> Finding:
    """Every safetensors file is there and whole, and together they hold the model of config.json: by their headers."""
    if (why := layout_problem(folder)) is not None:
        return problem(f"{name} weights", why, "get the whole checkpoint again, with its own config.json")
    num_files, size = len([*folder.glob("*.safetensors")]), weight_bytes(folder) / 2**20
    return ok(f"{name} weights", f"{num_files} file(s), {size:,.0f} MiB, all whole")


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
