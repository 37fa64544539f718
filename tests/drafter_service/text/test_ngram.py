"""Counts of one request: they fade, they are bounded, and nobody else's are in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.text.ngram import AdaptiveNgrams
from easyspec.datastore.corpus import SEPARATOR
from easyspec.datastore.ngram_table import NUM_SUCCESSORS, NgramTable, build_ngram_table


def likeliest(ngrams: AdaptiveNgrams) -> int | None:
    prediction = ngrams.predict(ngrams.end())
    return max(prediction.probabilities, key=prediction.probabilities.__getitem__) if prediction is not None else None


def test_the_longest_context_decides() -> None:
    ngrams = AdaptiveNgrams(100, None)
    ngrams.extend([1, 2, 3, 4, 9, 2, 3, 5, 9, 2, 3, 5, 1, 2, 3])
    assert likeliest(ngrams) == 4  # after 2, 3 alone, 5 is commoner


def test_a_shorter_context_stands_in() -> None:
    ngrams = AdaptiveNgrams(100, None)
    ngrams.extend([1, 2, 1, 2, 7, 1])
    assert likeliest(ngrams) == 2


def test_old_counts_fade() -> None:
    ngrams = AdaptiveNgrams(10_000, None)
    ngrams.extend([1, 2, 3] * 5)
    ngrams.extend([50 + index % 40 for index in range(6000)])
    ngrams.extend([1, 2, 4] * 2)
    ngrams.extend([1, 2])
    assert likeliest(ngrams) == 4


def test_memory_is_bounded() -> None:
    ngrams = AdaptiveNgrams(50, None)
    ngrams.extend([(index * 7919) % 1000 for index in range(5000)])
    ngrams.extend([token for index in range(500) for token in (1, index)])
    assert all(len(table) <= 50 for table in ngrams._tables)
    assert all(len(successors) <= NUM_SUCCESSORS for table in ngrams._tables for successors in table.values())


@settings(deadline=None, max_examples=60)
@given(text=st.lists(st.integers(0, 5), max_size=80), pieces=st.integers(1, 9))
def test_the_same_text_gives_the_same_counts(text: list[int], pieces: int) -> None:
    whole, in_pieces = AdaptiveNgrams(20, None), AdaptiveNgrams(20, None)
    whole.extend(text)
    for begin in range(0, len(text), pieces):
        in_pieces.extend(text[begin : begin + pieces])
    assert whole.predict(whole.end()) == in_pieces.predict(in_pieces.end())


def test_a_corpus_predicts_what_the_request_has_not_said(tmp_path: Path) -> None:
    corpus = np.array([1, 2, 3, 8] * 5 + [SEPARATOR], dtype=np.uint32)
    build_ngram_table(corpus, tmp_path / "table", "f")
    prior = NgramTable(tmp_path / "table", "f")
    ngrams = AdaptiveNgrams(100, prior)
    ngrams.extend([1, 2, 3])
    assert likeliest(ngrams) == 8
    ngrams.extend([9, 1, 2, 3, 9] * 12)
    ngrams.extend([1, 2, 3])
    assert likeliest(ngrams) == 9
