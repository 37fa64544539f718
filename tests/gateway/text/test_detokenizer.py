from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.text.detokenizer import Detokenizer, StopMatcher
from gateway.text.tokenizer import Tokenizer
from tests.fakes.tiny_tokenizer import END_OF_TEXT, write_metaspace_tokenizer, write_tokenizer

VOCAB_SIZE = 340


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_metaspace_tokenizer(tmp_path_factory.mktemp("metaspace")))


def run(tokenizer: Tokenizer, token_ids: list[int], cuts: list[int], stops: list[str]) -> tuple[list[str], int]:
    """Texts of the rounds that `cuts` make of the tokens, and how many tokens stood."""
    detokenizer = Detokenizer(tokenizer, stops)
    edges = [0, *sorted(cut % len(token_ids) for cut in cuts), len(token_ids)]
    texts, num_tokens = [], 0
    for start, end in itertools.pairwise(edges):
        taken = detokenizer.push(token_ids[start:end], is_last=end == len(token_ids))
        texts.append(taken.text)
        num_tokens += taken.num_tokens
        if taken.matched_stop is not None or end == len(token_ids):
            break
    return texts, num_tokens


def first_stop(text: str, stops: list[str]) -> int:
    """Where to cut: at the stop that is complete first, and of those that end together the longest."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return min(ends)[1] if ends else len(text)


# Bytes of multi-byte characters are the first 256 entries after the special token: make them frequent.
token_lists = st.lists(st.one_of(st.integers(1, VOCAB_SIZE - 1), st.integers(150, 256)), min_size=1, max_size=40)
cut_lists = st.lists(st.integers(0, 60), max_size=8)


@pytest.fixture(scope="module")
def module_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_joined_texts_are_the_decode_of_everything(module_tokenizer: Tokenizer, data: st.DataObject) -> None:
    token_ids = data.draw(token_lists)
    texts, num_tokens = run(module_tokenizer, token_ids, data.draw(cut_lists), [])
    assert "".join(texts) == module_tokenizer.decode(token_ids)
    assert num_tokens == len(token_ids)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stop_strings_cut_the_same_place_for_any_split(module_tokenizer: Tokenizer, data: st.DataObject) -> None:
    text = data.draw(st.text(alphabet="abST OP\né中😀", min_size=1, max_size=30))
    token_ids = list(module_tokenizer.encode(text))
    stops = data.draw(st.lists(st.text(alphabet="abST OP\né中😀", min_size=1, max_size=4), min_size=1, max_size=3))
    texts, num_tokens = run(module_tokenizer, token_ids, data.draw(cut_lists), stops)
    whole, num_whole = run(module_tokenizer, token_ids, [], stops)
    cut = first_stop(text, stops)
    assert "".join(texts) == text[:cut] == "".join(whole)
    assert num_tokens == num_whole
    if cut < len(text):
        kept = module_tokenizer.decode(token_ids[:num_tokens])
        shorter = module_tokenizer.decode(token_ids[: num_tokens - 1])
        assert any(stop in kept for stop in stops)
        assert not any(stop in shorter for stop in stops)


@pytest.mark.parametrize("offset", range(6))
def test_a_stop_string_at_every_offset_of_a_block_cuts_text_and_tokens(tokenizer: Tokenizer, offset: int) -> None:
    word = tokenizer.encode("!")
    stop = tokenizer.encode("#")
    assert len(word) == len(stop) == 1
    block = list(word) * offset + list(stop) + list(word) * (5 - offset)
    taken = Detokenizer(tokenizer, ["#"]).push(block, is_last=False)
    assert (taken.text, taken.num_tokens, taken.matched_stop) == ("!" * offset, offset + 1, "#")


def test_never_half_a_character(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("𐍈")
    assert len(token_ids) == 4
    detokenizer = Detokenizer(tokenizer, [])
    texts = [detokenizer.push([token_id], is_last=False).text for token_id in token_ids]
    assert texts == ["", "", "", "𐍈"]


def test_an_incomplete_character_at_the_end_is_flushed_as_a_full_decode_would(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a😀")[:-1]
    taken = Detokenizer(tokenizer, []).push(token_ids, is_last=True)
    assert taken.text == tokenizer.decode(token_ids) == "a\ufffd"


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.special_token_ids
    assert tokenizer.decode([end]) == END_OF_TEXT
    taken = Detokenizer(tokenizer, []).push([*tokenizer.encode("a"), end], is_last=True)
    assert (taken.text, taken.num_tokens) == ("a", 2)


def test_text_that_could_begin_a_stop_string_is_held_back_until_it_cannot(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ["STOP!"])
    texts = [detokenizer.push(tokenizer.encode(text), is_last=False).text for text in ("x S", "TO", "P", "?")]
    assert texts == ["x ", "", "", "STOP?"]
    held = Detokenizer(tokenizer, ["STOP!"])
    assert held.push(tokenizer.encode("a STOP"), is_last=True).text == "a STOP"


@pytest.mark.parametrize(
    ("words", "expected"), [([3, 4], "Hello world"), ([4, 5, 3], "worldwide Hello"), ([6, 7], "ab")]
)
def test_a_tokenizer_that_drops_the_first_blank_keeps_the_others(
    metaspace: Tokenizer, words: list[int], expected: str
) -> None:
    detokenizer = Detokenizer(metaspace, [])
    texts = [detokenizer.push([word], is_last=word == words[-1]).text for word in words]
    assert "".join(texts) == expected == metaspace.decode(words)


def test_of_two_stop_strings_the_one_complete_first_counts() -> None:
    matcher = StopMatcher(["bcd", "c"])
    assert matcher.push("a") + matcher.push("b") == "a"
    assert matcher.push("cd") == "b"
    assert matcher.matched == "c"


def test_of_two_stop_strings_that_end_together_the_longer_counts() -> None:
    matcher = StopMatcher(["c", "bc"])
    assert matcher.push("abc") == "a"
    assert matcher.matched == "bc"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_an_end_of_any_kind_reads_the_same_for_any_split(module_tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Stop string and stop token in one block, in every order: what counts is where the output ends."""
    text = data.draw(st.text(alphabet="abST OP\né中😀", min_size=1, max_size=20))
    ids = list(module_tokenizer.encode(text))
    stops = data.draw(st.lists(st.text(alphabet="abST OP\né中😀", min_size=1, max_size=4), max_size=3))
    includes_stop = data.draw(st.booleans())
    edges = sorted({0, len(ids), *(cut % len(ids) for cut in data.draw(cut_lists))})

    def said(edges: list[int]) -> tuple[str, int, str | None]:
        detokenizer = Detokenizer(module_tokenizer, stops, includes_stop=includes_stop)
        whole, num_tokens = "", 0
        for start, end in itertools.pairwise(edges):
            is_last = end == len(ids)
            taken = detokenizer.push(ids[start:end], is_last, has_stop_token=is_last)
            whole, num_tokens = whole + taken.text, num_tokens + taken.num_tokens
            if taken.matched_stop is not None:
                return whole, num_tokens, taken.matched_stop
        return whole, num_tokens, None

    whole, num_tokens, matched = said([0, len(ids)])
    assert said(edges) == (whole, num_tokens, matched)
    seen = module_tokenizer.decode(ids if includes_stop else ids[:-1])
    cut = first_stop(seen, stops)
    if matched is None:
        assert (whole, num_tokens, cut) == (seen, len(ids), len(seen))
    else:
        assert whole == seen[: cut + (len(matched) if includes_stop else 0)]


class CountingDecoder:
    """A tokenizer that knows the most tokens it was asked to decode at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.special_token_ids = tokenizer.special_token_ids
        self.most_tokens = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.most_tokens = max(self.most_tokens, len(token_ids))
        return self._tokenizer.decode(token_ids)


@pytest.mark.parametrize("byte", [0x80, 0xE4])
def test_bytes_that_never_become_a_character_are_not_decoded_again_and_again(tokenizer: Tokenizer, byte: int) -> None:
    (token_id,) = (each for each in range(1, 257) if tokenizer.token_bytes(each) == bytes([byte]))
    letters = [each for each in range(1, 257) if tokenizer.token_bytes(each) in (b"a", b"b")]
    token_ids = [*letters, *[token_id] * 1000, *letters]
    decoder = CountingDecoder(tokenizer)
    detokenizer = Detokenizer(decoder, [])
    text = "".join(detokenizer.push([each], is_last=False).text for each in token_ids)
    text += detokenizer.push([], is_last=True).text
    assert text == tokenizer.decode(token_ids)
    assert decoder.most_tokens <= 256
