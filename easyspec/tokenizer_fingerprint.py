"""Which tokenizer a checkpoint has, as one digest that roles can compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from easyspec.checkpoint.gguf_header import read_header
from easyspec.checkpoint.location import is_gguf
from easyspec.errors import ConfigurationError

TOKENIZER_FILE = "tokenizer.json"


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 hex digest of what gives token ids their meaning in `folder`'s tokenizer.json, or a GGUF file.

    That is every (id, token) pair, added tokens included, and the merges in order. Chat templates, truncation,
    padding of the embedding table and the like do not count: equal digests mean interchangeable token ids.
    Raises ConfigurationError if the file is missing or not a tokenizer.
    """
    token_of, merges = read_vocabulary(folder)
    canonical = json.dumps([sorted(token_of.items()), merges], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def read_vocabulary(folder: Path) -> tuple[dict[int, str], list[list[str]]]:
    """Every entry of `folder`'s tokenizer by id, added tokens included, and its merges; raises ConfigurationError."""
    if is_gguf(folder):
        header = read_header(folder)
        return header.vocabulary, [merge.split(" ") for merge in header.merges]
    path = folder / TOKENIZER_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary, merges = content["model"]["vocab"], content["model"].get("merges") or []
        if isinstance(vocabulary, Mapping):
            token_of = {int(token_id): token for token, token_id in vocabulary.items()}
        else:  # a unigram model lists [piece, score] in the order of ids
            token_of = {token_id: piece for token_id, (piece, _) in enumerate(vocabulary)}
        token_of |= {int(token["id"]): token["content"] for token in content.get("added_tokens") or []}
        # Merges are written as "a b" by older versions of the tokenizers library, as ["a", "b"] by newer ones.
        return token_of, [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in merges]
    except OSError as error:
        raise ConfigurationError(f"tokenizer file {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"tokenizer file {path} is not a tokenizer: {error!r}") from error


def tokens_by_id(folder: Path) -> dict[int, str]:
    """The entries alone; raises ConfigurationError."""
    return read_vocabulary(folder)[0]
