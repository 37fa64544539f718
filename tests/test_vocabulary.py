"""A pair that means different things by a token id is refused with the ids; padding is harmless."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from easyspec.errors import ConfigurationError
from easyspec.vocabulary import check_vocabularies, padding_note


def checkpoint(folder: Path, tokens: list[str], vocab_size: int = 8, merges: tuple[str, ...] = ()) -> Path:
    folder.mkdir()
    model = {"type": "BPE", "vocab": {token: index for index, token in enumerate(tokens)}, "merges": list(merges)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    return folder


def test_padding_is_said_and_goes_on(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", ["a", "b"], vocab_size=64)
    draft = checkpoint(tmp_path / "draft", ["a", "b"], vocab_size=128)
    check_vocabularies(base, draft)
    note = padding_note(base, draft)
    assert note is not None
    assert "64 rows" in note
    assert "128" in note
    assert padding_note(base, base) is None


def test_differing_entries_are_named(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", ["a", "b", "c", "d", "e", "f"])
    draft = checkpoint(tmp_path / "draft", ["a", "x", "c", "y", "e", "z", "extra"])
    problem = "of 4 differing entries the first are: 1 is 'b' and 'x'; 3 is 'd' and 'y'; 5 is 'f' and 'z'"
    with pytest.raises(ConfigurationError, match=problem):
        check_vocabularies(base, draft)


def test_differing_merges_change_no_id_and_are_said(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", ["a", "b", "ab"], merges=("a b",))
    note = check_vocabularies(base, checkpoint(tmp_path / "draft", ["a", "b", "ab"]))
    assert note is not None
    assert "merges differ" in note


def test_vocabularies_that_share_most_entries_go_together(tmp_path: Path) -> None:
    tokens = [f"t{index}" for index in range(30)]
    base = checkpoint(tmp_path / "base", [*tokens, "<tool>", "<think>"])
    draft = checkpoint(tmp_path / "draft", [*tokens[:-1], "<other>"])
    note = check_vocabularies(base, draft)
    assert note is not None
    assert "only shared tokens are drafted: of 3 differing entries the first are: 29 is 't29' and '<other>'" in note
    less = checkpoint(tmp_path / "less", [*tokens[:26], *"abcd"])
    with pytest.raises(ConfigurationError, match=r"different vocabularies: .* guesses come from the text itself"):
        check_vocabularies(base, less)
