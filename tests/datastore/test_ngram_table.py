"""The table counts what a dictionary counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from easyspec.datastore import ngram_table
from easyspec.datastore.corpus import SEPARATOR
from easyspec.datastore.ngram_table import NUM_SUCCESSORS, NgramTable, build_ngram_table

FINGERPRINT = "f" * 64
documents = st.lists(st.lists(st.integers(0, 20), max_size=40), min_size=1, max_size=5)


def build(folder: Path, corpus: list[list[int]]) -> NgramTable:
    row = np.array([token for document in corpus for token in (*document, SEPARATOR)], dtype=np.uint32)
    build_ngram_table(row, folder / "table", FINGERPRINT)
    return NgramTable(folder / "table", FINGERPRINT)


def counted(corpus: list[list[int]], order: int) -> dict[tuple[int, ...], Counter[int]]:
    counts: dict[tuple[int, ...], Counter[int]] = {}
    for document in corpus:
        for place in range(order, len(document)):
            counts.setdefault(tuple(document[place - order : place]), Counter())[document[place]] += 1
    return counts


@pytest.mark.parametrize("chunk", [1 << 24, 8])
@given(corpus=documents)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_successors_are_the_commonest_ones(tmp_path: Path, chunk: int, corpus: list[list[int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngram_table, "_CHUNK_TOKENS", chunk)
        table = build(tmp_path, corpus)
    for order in (1, 2, 3):
        for context, counts in counted(corpus, order).items():
            found = table.successors(context)
            if order > 1 and counts.total() == 1:
                assert found is None
                continue
            assert found is not None
            expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_SUCCESSORS]
            assert list(zip(found.token_ids, found.counts, strict=True)) == expected
            assert found.total == counts.total()


@given(corpus=documents)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_commonest_tokens_have_their_shares(tmp_path: Path, corpus: list[list[int]]) -> None:
    table = build(tmp_path, corpus)
    followed = Counter(token for document in corpus for token in document[:-1])
    token_ids, shares = table.commonest(1000)
    found = dict(zip(token_ids.tolist(), shares.tolist(), strict=True))
    following = {token for document in corpus for token in document[1:]}
    if all(len(counts) <= NUM_SUCCESSORS for counts in counted(corpus, 1).values()):
        assert found.keys() == followed.keys() & following
    assert found == pytest.approx({token: followed[token] / followed.total() for token in found})
    assert [*found.values()] == sorted(found.values(), reverse=True)
    assert [*found][:2] == table.commonest(2)[0].tolist()


def test_an_unknown_context_has_none(tmp_path: Path) -> None:
    table = build(tmp_path, [[1, 2, 3] * 4])
    assert table.successors((7,)) is None
    assert table.successors((2, 1)) is None
    assert table.successors((3, 2, 1)) is None
