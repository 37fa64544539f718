"""Whether two checkpoints, or two services, mean the same by a token id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from easyspec.errors import ConfigurationError
from easyspec.tokenizer_fingerprint import tokenizer_fingerprint, tokens_by_id

_NUM_SHOWN = 3


def check_vocabularies(base: Path, draft: Path) -> None:
    """Raise ConfigurationError, naming the first differing entries, unless base and draft share a tokenizer.

    How many rows an embedding table is padded to does not matter.
    """
    if tokenizer_fingerprint(base) == tokenizer_fingerprint(draft):
        return
    difference = vocabulary_difference(tokens_by_id(base), tokens_by_id(draft))
    if difference is None:
        raise ConfigurationError(f"base {base} and draft {draft} share all tokens and differ in their merges")
    raise ConfigurationError(f"base {base} and draft {draft} have different vocabularies: {difference}")


def vocabulary_difference(first: Mapping[int, str], second: Mapping[int, str]) -> str | None:
    """How two vocabularies (token id -> token) differ, naming the first entries that do; None if they do not."""
    differing = [
        token_id for token_id in sorted(first.keys() | second.keys()) if first.get(token_id) != second.get(token_id)
    ]
    if not differing:
        return None
    shown = "; ".join(
        f"{token_id} is {first.get(token_id)!r} and {second.get(token_id)!r}" for token_id in differing[:_NUM_SHOWN]
    )
    return f"of {len(differing)} differing entries the first are: {shown}"


def padding_note(base: Path, draft: Path) -> str | None:
    """A sentence if embedding tables of a pair with one tokenizer are padded differently, which is harmless."""
    base_rows, draft_rows = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size") for folder in (base, draft)
    )
    return rows_note(base_rows, draft_rows)


def rows_note(base_rows: int | None, draft_rows: int | None) -> str | None:
    """The same of a pair whose tables have so many rows."""
    if base_rows == draft_rows:
        return None
    return f"embedding tables of base ({base_rows} rows) and draft ({draft_rows}) differ by padding only: going on"
