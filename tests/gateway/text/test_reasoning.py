"""Thinking is told apart from the answer, however the text is cut into pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyspec.speculation.parameters import Thinking
from gateway.generation.answer import AnswerForm, AnswerText
from gateway.text.reasoning import HARMONY, Marks, ReasoningSplitter, marks_in, thinking_after
from gateway.text.tokenizer import Tokenizer

MARKS = Marks("<think>", "</think>")
EXPECTED, OPEN = (Thinking(MARKS.opening, MARKS.closing, is_open) for is_open in (False, True))
CHANNELS = Thinking(HARMONY.opening, HARMONY.closing, False, HARMONY.answer)
CHANNEL_FRAGMENTS = [*HARMONY, "<|channel|>", "final", "<|message|>", "hm", "<|", " "]
FRAGMENTS = ["<think>", "</think>", "<th", "</", "ink>", "hm", " ", "\n", "<", "answer"]


def split(thinking: Thinking, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(thinking)
    parts = [*map(splitter.push, pieces), splitter.flush()]
    return "".join(part.reasoning for part in parts), "".join(part.text for part in parts)


@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [
        (EXPECTED, "<think>\nhm, so\n</think>\n\n{1}", ("hm, so", "{1}")),
        (EXPECTED, "\n<think></think> yes", ("", "yes")),
        (EXPECTED, " yes </think>", ("", " yes </think>")),
        (EXPECTED, "<thin", ("", "<thin")),
        (EXPECTED, "<think>hm\n ", ("hm", "")),
        (OPEN, "\nhm</think>\nyes\n", ("hm", "yes\n")),
        (OPEN, "hm <think> </thin </think>a</think>", ("hm <think> </thin", "a</think>")),
        (OPEN, "hm", ("hm", "")),
        (CHANNELS, f"{HARMONY.opening}hm{HARMONY.closing}{HARMONY.answer}{{1}}", ("hm", "{1}")),
        (CHANNELS, f"{HARMONY.answer} {{1}}", ("", "{1}")),
        (CHANNELS, "{1}", ("", "{1}")),
        (CHANNELS, f"{HARMONY.opening}hm{HARMONY.closing}<|channel|>fin", ("hm", "")),
        (CHANNELS, "<|channel|>", ("", "")),
    ],
)
def test_what_is_thought_and_what_is_said(thinking: Thinking, text: str, expected: tuple[str, str]) -> None:
    assert split(thinking, [text]) == split(thinking, list(text)) == expected


@given(st.sampled_from([EXPECTED, OPEN, CHANNELS]), st.data())
def test_every_cut_reads_the_same(thinking: Thinking, data: st.DataObject) -> None:
    known = CHANNEL_FRAGMENTS if thinking is CHANNELS else FRAGMENTS
    text = "".join(data.draw(st.lists(st.sampled_from(known), max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(thinking, pieces) == split(thinking, [text])


@given(st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=10), st.data())
def test_tokens_of_thinking_are_counted_alike_in_blocks_of_any_size(
    tokenizer: Tokenizer, fragments: list[str], data: st.DataObject
) -> None:
    token_ids = tokenizer.encode("<think>" + "".join(fragments))
    cuts = sorted(data.draw(st.lists(st.integers(1, len(token_ids)), max_size=6)))

    def taken(edges: list[int]) -> tuple[str, str, int]:
        answer = AnswerText(tokenizer, AnswerForm(thinking=EXPECTED))
        rounds = [
            answer.push(token_ids[start:end], is_last=end == len(token_ids))
            for start, end in itertools.pairwise(edges)
            if start < end
        ]
        said, thought = "".join(one.parsed.text for one in rounds), "".join(one.parsed.reasoning for one in rounds)
        return thought, said, sum(one.num_reasoning_tokens for one in rounds)

    whole = taken([0, len(token_ids)])
    assert taken([0, *cuts, len(token_ids)]) == whole
    assert whole[2] > 0


def test_what_a_prompt_says_about_thinking() -> None:
    assert marks_in("{{ content.split('</think>') }}") == MARKS
    assert marks_in("{{ content }}") is None
    assert thinking_after("<|assistant|><think>\n", "", MARKS) == OPEN
    assert thinking_after("<|assistant|>\n", "", MARKS) == EXPECTED
    assert thinking_after("<|assistant|><think>\n\n</think>\n\n", "", MARKS) is None
    assert thinking_after("<|user|><think>\n<|assistant|>", "", MARKS) == EXPECTED
    assert marks_in("{{ '<|start|>assistant<|channel|>final' }}") == HARMONY
    assert thinking_after("<|end|><|start|>assistant", "", HARMONY) == CHANNELS
    assert thinking_after(f"<|start|>assistant{HARMONY.answer}", "", HARMONY) is None
    assert thinking_after("...<think>hm", "<think>hm", MARKS) == OPEN
    assert thinking_after("...<think>hm</think>so", "<think>hm</think>so", MARKS) is None
    assert thinking_after("x", "", None) is None
