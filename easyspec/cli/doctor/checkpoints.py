"""Checks of the base and the draft checkpoint: each alone, and whether they fit together. Loads no weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyspec.checkpoint.location import is_gguf, weight_bytes
from easyspec.cli.doctor.gguf import check_gguf_file
from easyspec.cli.doctor.report import Finding, ok, problem, warning
from easyspec.cli.doctor.weights import check_weights
from easyspec.errors import ConfigurationError
from easyspec.model.supported_models import QUANTIZATION_METHODS, SUPPORTED_ACTIVATIONS, SUPPORTED_MODEL_TYPES
from easyspec.tokenizer_fingerprint import read_vocabulary, tokenizer_fingerprint

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
            config, gguf_findings = check_gguf_file(name, folder)
            findings += gguf_findings
        else:
            config, finding = _check_config(name, folder)
            findings.append(finding)
            if folder.is_dir():
                findings += [check_weights(name, folder), _check_tokenizer(name, folder)]
        checkpoints.append(Checkpoint(name, folder, config))
    if len(checkpoints) == 2 and all(checkpoint.folder.exists() for checkpoint in checkpoints):
        findings += check_pair(*checkpoints)
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
    method = (config.get("quantization_config") or {}).get("quant_method")
    why = None
    if model_type not in SUPPORTED_MODEL_TYPES:
        why = f"model_type is {model_type!r}"
    elif config.get("hidden_act", "silu") not in SUPPORTED_ACTIVATIONS:
        why = f"hidden_act is {config['hidden_act']!r}"
    elif config.get("quantization_config") is not None and method not in QUANTIZATION_METHODS:
        why = f"quant_method is {method!r}"
    if why is not None:
        families = ", ".join(SUPPORTED_MODEL_TYPES)
        return config, problem(check, why, f"use a checkpoint of a supported family: {families}")
    shape = f"{config.get('num_hidden_layers')} layers of {config.get('hidden_size')}"
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    drafting = ", drafts all levels in one pass (PARD)" if config.get("pard_token") is not None else ""
    text = f"{model_type}, {shape}, {dtype}, {config.get('max_position_embeddings')} positions{drafting}"
    return config, ok(check, text)


def _check_tokenizer(name: str, folder: Path) -> Finding:
    check = f"{name} tokenizer"
    try:
        fingerprint = tokenizer_fingerprint(folder)
    except ConfigurationError as error:
        advice = "only fast tokenizers are supported: save one with AutoTokenizer.from_pretrained(...).save_pretrained"
        return problem(check, str(error), advice)
    has_template = (folder / "chat_template.jinja").is_file()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        of_tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        has_template = has_template or bool(of_tokenizer.get("chat_template"))
    if name == "base" and not has_template:
        advice = "chat requests will be refused; add the model's chat_template.jinja if it has one"
        return warning(check, f"fast, fingerprint {fingerprint[:12]}, no chat template", advice)
    return ok(check, f"fast, fingerprint {fingerprint[:12]}")


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
    base_tokens, base_merges = read_vocabulary(base)
    draft_tokens, draft_merges = read_vocabulary(draft)
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
