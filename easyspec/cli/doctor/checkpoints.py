"""Checks of the base and the draft checkpoint: each alone, and whether they fit together. Loads no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyspec.checkpoint.gguf_header import read_header
from easyspec.checkpoint.location import is_gguf, weight_bytes
from easyspec.cli.doctor.gguf import check_gguf, check_gguf_template, gguf_config
from easyspec.cli.doctor.report import Finding, ok, problem, warning
from easyspec.cli.doctor.weights import check_weights
from easyspec.errors import ConfigurationError
from easyspec.model.families import QUANTIZATION_METHODS, SUPPORTED_ACTIVATIONS, SUPPORTED_MODEL_TYPES
from easyspec.tokenizer_fingerprint import TOKENIZER_FILE, tokenizer_fingerprint

_MAX_DIFFERENCES = 3


@dataclass(frozen=True)
class Checkpoint:
    """A folder and its config.json, empty if there is none that can be read."""

    name: str
    folder: Path
    config: Mapping[str, Any]

    @property
    def context(self) -> int | None:
        """Most positions, as far as the configuration tells."""
        positions = self.config.get("max_position_embeddings")
        return positions if isinstance(positions, int) else None


def checkpoint_findings(base: Path, draft: Path | None) -> list[Finding]:
    """All checks of the folders, in the order of the report."""
    findings: list[Finding] = []
    checkpoints: list[Checkpoint] = []
    for name, folder in (("base", base), ("draft", draft)):
        if folder is None:
            continue
        if is_gguf(folder) and folder.is_file():
            config, gguf_findings = _check_gguf(name, folder)
            findings += gguf_findings
            checkpoints.append(Checkpoint(name, folder, config))
            continue
        config, finding = _check_config(name, folder)
        findings.append(finding)
        checkpoints.append(Checkpoint(name, folder, config))
        if folder.is_dir():
            findings.append(check_weights(name, folder))
            findings.append(_check_tokenizer(name, folder))
    if len(checkpoints) == 2 and all(checkpoint.folder.exists() for checkpoint in checkpoints):
        findings += check_pair(*checkpoints)
    return findings


def _check_gguf(name: str, file: Path) -> tuple[Mapping[str, Any], list[Finding]]:
    try:
        header = read_header(file)
    except ConfigurationError as error:
        return {}, [problem(f"{name} config", str(error), "download it again, or name another file")]
    findings = check_gguf(name, header)
    try:
        findings.append(check_gguf_template(name, header, tokenizer_fingerprint(file)))
    except ConfigurationError as error:
        findings.append(problem(f"{name} tokenizer", str(error), "get a file with a tokenizer in it"))
    return gguf_config(header), findings


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
    if why := _unsupported(config):
        families = ", ".join(SUPPORTED_MODEL_TYPES)
        return config, problem(check, why, f"use a checkpoint of a supported family: {families}")
    shape = f"{config.get('num_hidden_layers')} layers of {config.get('hidden_size')}"
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    drafting = ", drafts all levels in one pass (PARD)" if config.get("pard_token") is not None else ""
    text = f"{model_type}, {shape}, {dtype}, {config.get('max_position_embeddings')} positions{drafting}"
    return config, ok(check, text)


def _unsupported(config: Mapping[str, Any]) -> str | None:
    """Why the decoder cannot run this; what it says at start-up, told before."""
    if config["model_type"] not in SUPPORTED_MODEL_TYPES:
        return f"model_type is {config['model_type']!r}"
    if config.get("hidden_act", "silu") not in SUPPORTED_ACTIVATIONS:
        return f"hidden_act is {config['hidden_act']!r}"
    method = (config.get("quantization_config") or {}).get("quant_method")
    if config.get("quantization_config") is not None and method not in QUANTIZATION_METHODS:
        return f"quant_method is {method!r}"
    return None


def _check_tokenizer(name: str, folder: Path) -> Finding:
    check = f"{name} tokenizer"
    try:
        fingerprint = tokenizer_fingerprint(folder)
    except ConfigurationError as error:
        advice = "only fast tokenizers are supported: save one with AutoTokenizer.from_pretrained(...).save_pretrained"
        return problem(check, str(error), advice)
    if name == "base" and not _has_chat_template(folder):
        advice = "chat requests will be refused; add the model's chat_template.jinja if it has one"
        return warning(check, f"fast, fingerprint {fingerprint[:12]}, no chat template", advice)
    return ok(check, f"fast, fingerprint {fingerprint[:12]}")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def check_pair(base: Checkpoint, draft: Checkpoint) -> list[Finding]:
    """Whether the draft can guess for the base, and whether that can pay."""
    findings = [_check_vocabularies(base, draft)]
    base_bytes, draft_bytes = weight_bytes(base.folder), weight_bytes(draft.folder)
    if base_bytes and draft_bytes >= base_bytes:
        message = f"the draft's weights are {draft_bytes / base_bytes:.1f} times the base's"
        findings.append(warning("pair size", message, "a draft pays only if it is much smaller; swap the two?"))
    elif base_bytes:
        findings.append(ok("pair size", f"the base is {base_bytes / max(draft_bytes, 1):.1f} times the draft"))
    if base.context is not None and draft.context is not None and draft.context < base.context:
        message = f"the draft has {draft.context} positions, the base {base.context}"
        advice = f"nothing is guessed after position {draft.context}; a draft with a longer context guesses on"
        findings.append(warning("pair context", message, advice))
    return findings


def _check_vocabularies(base: Checkpoint, draft: Checkpoint) -> Finding:
    check = "pair tokenizer"
    try:
        is_equal = tokenizer_fingerprint(base.folder) == tokenizer_fingerprint(draft.folder)
    except ConfigurationError:
        return problem(check, "cannot be compared", "see the tokenizers above")
    sizes = base.config.get("vocab_size"), draft.config.get("vocab_size")
    if not is_equal:
        advice = "use a draft with the base's tokenizer, usually a smaller model of the same family and release"
        return problem(check, "; ".join(explain_difference(base.folder, draft.folder)), advice)
    if sizes[0] != sizes[1]:
        return ok(check, f"equal; embeddings of {sizes[0]} and {sizes[1]} entries differ only by padding")
    return ok(check, "equal")


def explain_difference(base: Path, draft: Path) -> list[str]:
    """Where two tokenizers part: the first entries by id, then merges. Raises ConfigurationError for no tokenizer."""
    base_tokens, base_merges = _vocabulary(base)
    draft_tokens, draft_merges = _vocabulary(draft)
    differing = [
        token_id
        for token_id in sorted(base_tokens.keys() | draft_tokens.keys())
        if base_tokens.get(token_id) != draft_tokens.get(token_id)
    ]
    parts = []
    if differing:
        shown = [
            f"id {token_id} is {_shown(base_tokens, token_id)} in base and {_shown(draft_tokens, token_id)} in draft"
            for token_id in differing[:_MAX_DIFFERENCES]
        ]
        parts.append(
            f"{len(differing)} of {max(len(base_tokens), len(draft_tokens))} entries differ: {', '.join(shown)}"
        )
    if base_merges != draft_merges:
        same = next((i for i, (a, b) in enumerate(zip(base_merges, draft_merges, strict=False)) if a != b), None)
        where = f"from number {same} on" if same is not None else f"in number: {len(base_merges)}, {len(draft_merges)}"
        parts.append(f"merges differ {where}")
    return parts


def _shown(tokens: Mapping[int, str], token_id: int) -> str:
    return repr(tokens[token_id]) if token_id in tokens else "missing"


def _vocabulary(folder: Path) -> tuple[dict[int, str], list[list[str]]]:
    """Tokens by id, added ones included, and merges."""
    if is_gguf(folder):
        header = read_header(folder)
        return header.vocabulary, [merge.split(" ") for merge in header.merges]
    content = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, Mapping):
        tokens = {int(token_id): token for token, token_id in vocabulary.items()}
    else:
        tokens = {token_id: piece for token_id, (piece, _) in enumerate(vocabulary)}
    tokens |= {int(token["id"]): token["content"] for token in content.get("added_tokens") or []}
    merges = content["model"].get("merges") or []
    return tokens, [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]
