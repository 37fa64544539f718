"""Whether two checkpoints mean the same by a token id."""

from __future__ import annotations

import json
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
    base_tokens, draft_tokens = tokens_by_id(base), tokens_by_id(draft)
    differing = [
        token_id
        for token_id in sorted(base_tokens.keys() | draft_tokens.keys())
        if base_tokens.get(token_id) != draft_tokens.get(token_id)
    ]
    if not differing:
        raise ConfigurationError(f"base {base} and draft {draft} share all tokens and differ in their merges")
    shown = "; ".join(
        f"{token_id} is {base_tokens.get(token_id)!r} and {draft_tokens.get(token_id)!r}"
        for token_id in differing[:_NUM_SHOWN]
    )
    raise ConfigurationError(
        f"base {base} and draft {draft} have different vocabularies: of {len(differing)} differing entries the first "
        f"are: {shown}"
    )


def padding_note(base: Path, draft: Path) -> str | None:
    """A sentence if embedding tables of a pair with one tokenizer are padded differently, which is harmless."""
    base_rows, draft_rows = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")).get("vocab_size") for folder in (base, draft)
    )
    if base_rows == draft_rows:
        return None
    return f"embedding tables of base ({base_rows} rows) and draft ({draft_rows}) differ by padding only: going on"
