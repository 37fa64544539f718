"""Whether two checkpoints, or two services, mean the same by a token id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from easyspec.checkpoint.gguf_header import read_header
from easyspec.checkpoint.location import is_gguf
from easyspec.errors import ConfigurationError
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint, tokens_by_id

_NUM_SHOWN = 3
# Models of one family differ by added tokens, a handful in a hundred thousand.
_LEAST_SHARED = 0.9
_WAY_OUT = "; name a draft model of the base's own family, or none: then guesses come from the text itself"


def check_vocabularies(base: Path, draft: Path) -> str | None:
    """None where base and draft have one tokenizer, a sentence where their vocabularies share most entries.

    How many rows an embedding table is padded to does not matter. Raises ConfigurationError, naming the first differing
    entries, where the vocabularies really differ.
    """
    if tokenizer_fingerprint(base) == tokenizer_fingerprint(draft):
        return None
    ours, theirs = tokens_by_id(base), tokens_by_id(draft)
    difference = vocabulary_difference(ours, theirs) or "all tokens are shared, and merges differ"
    if not is_mostly_shared(ours, theirs):
        raise ConfigurationError(f"base {base} and draft {draft} have different vocabularies: {difference}{_WAY_OUT}")
    return f"base and draft share most of their vocabularies, and only shared tokens are drafted: {difference}"


def is_mostly_shared(first: Mapping[int, str], second: Mapping[int, str]) -> bool:
    """Whether the smaller of two vocabularies means by nearly all of its ids what the other does."""
    num_shared = sum(second.get(token_id) == token for token_id, token in first.items())
    return num_shared >= _LEAST_SHARED * min(len(first), len(second))


def vocabulary_difference(first: Mapping[int, str], second: Mapping[int, str]) -> str | None:
    """How two vocabularies (token id -> token) differ, naming the first entries that do; None if they do not."""
    differing = differing_ids(first, second)
    if not differing:
        return None
    shown = "; ".join(
        f"{token_id} is {first.get(token_id)!r} and {second.get(token_id)!r}" for token_id in differing[:_NUM_SHOWN]
    )
    return f"of {len(differing)} differing entries the first are: {shown}"


def differing_ids(first: Mapping[int, str], second: Mapping[int, str]) -> list[int]:
    """Token ids that mean different tokens in two vocabularies, or are in one alone, ascending."""
    return sorted({token_id for token_id, _ in first.items() ^ second.items()})


def padding_note(base: Path, draft: Path) -> str | None:
    """A sentence if embedding tables of a pair with one tokenizer are padded differently, which is harmless."""
    return rows_note(_embedding_rows(base), _embedding_rows(draft))


def _embedding_rows(path: Path) -> int | None:
    if is_gguf(path):
        embeddings = read_header(path).tensors.get("token_embd.weight")
        return None if embeddings is None else embeddings.shape[0]
    rows: int | None = json.loads((path / "config.json").read_text(encoding="utf-8")).get("vocab_size")
    return rows


def rows_note(base_rows: int | None, draft_rows: int | None) -> str | None:
    """The same of a pair whose tables have so many rows."""
    if base_rows == draft_rows:
        return None
    return f"embedding tables of base ({base_rows} rows) and draft ({draft_rows}) differ by padding only: going on"
