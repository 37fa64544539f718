"""Which tokenizer a checkpoint has, as one digest that roles can compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from easyspec.checkpoint.gguf_header import read_header
from easyspec.checkpoint.location import is_gguf
from easyspec.errors import ConfigurationError

TOKENIZER_FILE = "tokenizer.json"

_ResultT = TypeVar("_ResultT")


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 hex digest of what gives token ids their meaning in `folder`'s tokenizer.json, or a GGUF file.

    That is every (id, token) pair, added tokens included, and the merges in order. Chat templates, truncation,
    padding of the embedding table and the like do not count: equal digests mean interchangeable token ids.
    Raises ConfigurationError if the file is missing or not a tokenizer.
    """
    return _read(folder, _digest)


def tokens_by_id(folder: Path) -> dict[int, str]:
    """Every entry of `folder`'s tokenizer.json, added tokens included; raises ConfigurationError like the digest."""
    return _read(folder, _token_of)


def _read(folder: Path, reading: Callable[[Mapping[str, Any], list[Mapping[str, Any]]], _ResultT]) -> _ResultT:
    if is_gguf(folder):
        header = read_header(folder)
        vocabulary = {token: token_id for token_id, token in header.vocabulary.items()}
        return reading({"vocab": vocabulary, "merges": header.merges}, [])
    path = folder / TOKENIZER_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return reading(content["model"], content.get("added_tokens") or [])
    except OSError as error:
        raise ConfigurationError(f"tokenizer file {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"tokenizer file {path} is not a tokenizer: {error!r}") from error


def _token_of(model: Mapping[str, Any], added_tokens: list[Mapping[str, Any]]) -> dict[int, str]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        token_of = {int(token_id): token for token, token_id in vocabulary.items()}
    else:  # a unigram model lists [piece, score] in the order of ids
        token_of = {token_id: piece for token_id, (piece, _) in enumerate(vocabulary)}
    return token_of | {int(token["id"]): token["content"] for token in added_tokens}


def _digest(model: Mapping[str, Any], added_tokens: list[Mapping[str, Any]]) -> str:
    token_of = _token_of(model, added_tokens)
    # Merges are written as "a b" by older versions of the tokenizers library, as ["a", "b"] by newer ones.
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]
    canonical = json.dumps([sorted(token_of.items()), merges], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
