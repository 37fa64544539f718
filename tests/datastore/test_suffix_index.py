"""The index finds what a search through all of the corpus finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from easyspec.datastore.corpus import SEPARATOR
from easyspec.datastore.suffix_index import SuffixIndex, build_suffix_index

FINGERPRINT = "f" * 64

# Few tokens, so that they repeat; large ones, so that byte order and width matter.
tokens = st.sampled_from([0, 1, 2, 255, 256, 65_535, 70_000])
documents = st.lists(st.lists(tokens, max_size=24), min_size=1, max_size=5)


def build(folder: Path, corpus: list[list[int]], max_shard_tokens: int = 1 << 20) -> SuffixIndex:
    row = np.array([token for document in corpus for token in (*document, SEPARATOR)], dtype=np.uint32)
    path = folder / "index"
    build_suffix_index(row, path, FINGERPRINT, max_shard_tokens)
    return SuffixIndex(path, FINGERPRINT)


def occurrences(corpus: list[list[int]], pattern: list[int]) -> list[list[int]]:
    """What followed the pattern, everywhere."""
    size = len(pattern)
    return [
        document[end:]
        for document in corpus
        for end in range(size, len(document) + 1)
        if document[end - size : end] == pattern
    ]


@given(corpus=documents, context=st.lists(tokens, min_size=1, max_size=8))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_longest_suffix_is_found_with_all_its_places(
    tmp_path: Path, corpus: list[list[int]], context: list[int]
) -> None:
    index = build(tmp_path, corpus)
    matches = index.longest_matches(context, min_length=1, max_length=6)
    expected = max((n for n in range(1, min(6, len(context)) + 1) if occurrences(corpus, context[-n:])), default=0)
    assert [match.length for match in matches] == ([expected] if expected else [])
    for match in matches:
        for length in range(1, match.length + 1):
            shorter = index.shorten(context, match, length)
            followed = [tuple(continuation[:4]) for continuation in occurrences(corpus, context[-length:])]
            assert sorted(index.continuations(shorter, 10_000, 4)) == sorted(followed)


@given(corpus=documents)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shards_together_hold_the_corpus(tmp_path: Path, corpus: list[list[int]]) -> None:
    """A document cut by the border of shards loses what spans it; single tokens are all there."""
    index = build(tmp_path, corpus, max_shard_tokens=7)
    for token in {token for document in corpus for token in document}:
        matches = index.longest_matches([token], min_length=1, max_length=1)
        assert sum(match.num_places for match in matches) == sum(document.count(token) for document in corpus)


def test_few_places_stand_for_many(tmp_path: Path) -> None:
    index = build(tmp_path, [[1, 2, token] for token in range(3, 103)])
    (match,) = index.longest_matches([9, 1, 2], min_length=2, max_length=16)
    assert (match.length, match.num_places) == (2, 100)
    sample = index.continuations(match, max_places=10, num_tokens=5)
    assert len(sample) == 10
    assert len({tuple(continuation) for continuation in sample}) == 10


def test_building_without_the_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydivsufsort", None)
    with pytest.raises(Exception, match=r"easyspec\[index\]"):
        build(tmp_path, [[1, 2]])
