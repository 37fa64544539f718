"""Exercises in copying: blocks of one window, each with its original before the copy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.recipe.copying import Stream, copying_stream
from models.recipe.corpus import Document, Kind
from models.recipe.settings import MODELS, CopyingSettings
from models.recipe.tokenizer import END_OF_TEXT

_SETTINGS = CopyingSettings(share=0.5, block_tokens=256, original_chars=(40, 400))
_SOURCE = '''\
def count_words(text, minimum=1):
    """Return how often each word of the text occurs, rare ones left out."""
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
    return counts
'''
_CORPUS: Stream = (np.arange(20_000) * 7 % 500 + 100).astype(np.uint16)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(MODELS / "base")
    return loaded


@pytest.fixture(scope="module")
def blocks(tokenizer: PreTrainedTokenizerFast) -> Sequence[list[int]]:
    stream = copying_stream(tokenizer, [Document("example", Kind.LIBRARY, _SOURCE)], _CORPUS, _SETTINGS)
    return stream.reshape(-1, _SETTINGS.block_tokens).tolist()


def test_the_share_of_all_tokens_is_as_set(blocks: Sequence[list[int]]) -> None:
    num_tokens = len(blocks) * _SETTINGS.block_tokens
    assert num_tokens / (num_tokens + len(_CORPUS)) == pytest.approx(_SETTINGS.share, abs=0.01)


def test_every_exercise_is_whole_and_its_copy_differs_by_the_edit_alone(
    tokenizer: PreTrainedTokenizerFast, blocks: Sequence[list[int]]
) -> None:
    texts = [text for block in blocks for text in tokenizer.decode(block).split(END_OF_TEXT)[:-1]]
    renamed = [text for text in texts if "def count_words(" in text and "def new_count_words(" in text]
    assert renamed
    for text in renamed:
        body = _SOURCE.split("\n", 1)[1].strip()
        assert text.count(body) == 2, text
        assert text.index("def count_words(") < text.index("def new_count_words(")


def test_what_is_left_of_a_block_is_said_twice(tokenizer: PreTrainedTokenizerFast, blocks: Sequence[list[int]]) -> None:
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    tails = [list(itertools.takewhile(lambda token_id: token_id != end, reversed(block)))[::-1] for block in blocks]
    long_tails = [tail for tail in tails if len(tail) >= 48]
    assert long_tails
    for tail in long_tails:
        length = next(n for n in range(1, len(tail)) if tail[n:] == tail[:-n])
        assert length <= len(tail) // 2
    steps = [{(after - before) % 500 for before, after in itertools.pairwise(tail[:6])} for tail in long_tails]
    as_in_the_corpus = [found == {7} for found in steps]
    assert any(as_in_the_corpus)
    assert not all(as_in_the_corpus)  # half of them are shuffled


def test_a_corpus_without_a_function_to_copy_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no function of 40 to 400 characters"):
        copying_stream(tokenizer, [Document("example", Kind.LIBRARY, "x = 1\n")], _CORPUS, _SETTINGS)


def test_equal_settings_give_equal_blocks_and_another_seed_others(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [Document("example", Kind.LIBRARY, _SOURCE)]
    first, again, other = (
        copying_stream(tokenizer, documents, _CORPUS, replace(_SETTINGS, seed=seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
