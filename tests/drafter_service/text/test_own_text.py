"""The automaton knows what a search through the text finds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.text.own_text import OwnText, Place, SuffixAutomaton

texts = st.lists(st.integers(0, 3), min_size=1, max_size=30)  # shorter than the cap on updated states


def followers(text: list[int], suffix: list[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for end in range(len(suffix), len(text)):
        if text[end - len(suffix) : end] == suffix:
            found[text[end]] = found.get(text[end], 0) + 1
    return found


def latest(text: list[int], suffix: list[int]) -> int | None:
    ends = [end for end in range(len(suffix), len(text)) if text[end - len(suffix) : end] == suffix]
    return text[ends[-1]] if ends else None


def longest_before(text: list[int]) -> int:
    """Length of the longest suffix that occurs earlier too."""
    return max((n for n in range(1, len(text)) if followers(text, text[-n:])), default=0)


@settings(deadline=None, max_examples=60)
@given(text=texts, pieces=st.integers(1, 5))
def test_the_end_is_the_longest_suffix_that_was_there_before(text: list[int], pieces: int) -> None:
    automaton = SuffixAutomaton()
    for begin in range(0, len(text), pieces):
        automaton.extend(text[begin : begin + pieces])
    place = automaton.end()
    assert place.length == longest_before(text)
    context: Place | None = place
    while context is not None and context.length > 0:
        suffix = text[len(text) - context.length :]
        assert automaton.followers(context) == followers(text, suffix)
        assert automaton.latest_follower(context) == latest(text, suffix)
        context = automaton.shorter(context)


@settings(deadline=None, max_examples=60)
@given(text=texts, path=st.lists(st.integers(0, 3), max_size=6))
def test_a_step_finds_the_longest_suffix_of_the_path(text: list[int], path: list[int]) -> None:
    automaton = SuffixAutomaton()
    automaton.extend(text)
    place = automaton.end()
    walked = [*text]
    for token in path:
        place = automaton.step(place, token)
        walked.append(token)
        known = [n for n in range(1, len(walked)) if any(_occurs(text, walked[-n:]))]
        assert place.length == max(known, default=0)


def _occurs(text: list[int], pattern: list[int]) -> list[bool]:
    return [text[begin : begin + len(pattern)] == pattern for begin in range(len(text) - len(pattern) + 1)]


def test_repeating_one_token_costs_the_same_for_every_token() -> None:
    """The suffix path is as long as the text here; only a bounded part of it is touched."""
    automaton = SuffixAutomaton()
    automaton.extend([5] * 50_000)
    assert automaton.end().length == 49_999
    assert automaton.followers(automaton.end()) == {5: 1}


def test_own_text_forgets_its_older_half() -> None:
    text = OwnText(max_tokens=64)
    text.extend([1, 2, 3, 4])
    text.extend([5] * 70)
    text.extend([1, 2, 3])
    assert text.predict(text.end()) is None
    text.extend([1, 2, 3])
    prediction = text.predict(text.end())
    assert prediction is not None
    assert set(prediction.probabilities) == {1}


@settings(deadline=None, max_examples=60)
@given(text=st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_predictions_are_probabilities(text: list[int]) -> None:
    own = OwnText(max_tokens=1000)
    own.extend(text)
    prediction = own.predict(own.end())
    if prediction is not None:
        assert all(0 < probability <= 1 for probability in prediction.probabilities.values())
        assert sum(prediction.probabilities.values()) <= 1 + 1e-9
