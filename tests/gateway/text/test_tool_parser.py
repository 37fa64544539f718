from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.text.conversation import ToolDefinition, ToolMode, Tools
from gateway.text.tool_parser import ToolCallDelta, ToolCallParser
from gateway.text.tools import ToolDialect, parser_for

WEATHER = ToolDefinition("weather", "tells", '{"type": "object"}')
TIME = ToolDefinition("time")
HERMES, LLAMA, MISTRAL, NONE = ToolDialect.HERMES, ToolDialect.LLAMA3_JSON, ToolDialect.MISTRAL, ToolDialect.NONE
PARIS = '{"city": "Paris", "why": "a \\"}\\" [in] text", "days": [1, {"two": 2}]}'


def parser(dialect: ToolDialect = HERMES, mode: ToolMode = ToolMode.AUTO, is_parallel: bool = True) -> ToolCallParser:
    found = parser_for(Tools((WEATHER, TIME), mode, is_parallel=is_parallel), dialect)
    assert found is not None
    return found


def run(parser: ToolCallParser, pieces: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
    """What is said, and (name, arguments) of each call; checks the form of the deltas on the way."""
    said, calls = "", {}
    for piece in pieces:
        parsed = parser.push(piece)
        said += parsed.text
        for delta in parsed.calls:
            if delta.index not in calls:
                assert delta.id
                assert delta.name
                calls[delta.index] = [delta.name, ""]
            else:
                assert (delta.id, delta.name) == (None, None)
            calls[delta.index][1] += delta.arguments
    return said + parser.flush().text, [(name, arguments) for name, arguments in calls.values()]


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


CASES: list[tuple[ToolDialect, str, str, list[tuple[str, str]]]] = [
    (HERMES, "just text < and <tool", "just text < and <tool", []),
    (HERMES, f"<tool_call>\n{call('weather', PARIS)}\n</tool_call>", "", [("weather", PARIS)]),
    (HERMES, f"I look. \n<tool_call>{call('weather', PARIS)}</tool_call>", "I look.", [("weather", PARIS)]),
    (
        HERMES,
        f"<tool_call>\n{call('weather', PARIS)}\n</tool_call>\n<tool_call>\n{call('time', '{}')}\n</tool_call>\n",
        "",
        [("weather", PARIS), ("time", "{}")],
    ),
    (HERMES, f"<tool_call>{call('time', '{}')}</tool_call> and so", " and so", [("time", "{}")]),
    (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "time"}</tool_call>', "", [("time", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("time", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "time"}</tool_call>', "", [("time", "{}")]),
    # No calls after all: nothing is lost.
    (HERMES, "<tool_call>never mind", "<tool_call>never mind", []),
    (HERMES, f"<tool_call>{call('nuke', '{}')}</tool_call>", f"<tool_call>{call('nuke', '{}')}</tool_call>", []),
    (HERMES, "<tool_call>{broken}</tool_call>", "<tool_call>{broken}</tool_call>", []),
    (HERMES, f"<tool_call>x<tool_call>{call('time', '{}')}", "<tool_call>x", [("time", "{}")]),
    (HERMES, '<tool_call>{"name": "ti', '<tool_call>{"name": "ti', []),
    (HERMES, "<tool_call>", "<tool_call>", []),
    # Cut by the length: what was given out stays.
    (HERMES, '<tool_call>{"name": "time", "arguments": {"a": [1', "", [("time", '{"a": [1')]),
    (HERMES, f"<tool_call>{call('time', '{}')}", "", [("time", "{}")]),
    (LLAMA, call("weather", PARIS, "parameters"), "", [("weather", PARIS)]),
    (LLAMA, f"<|python_tag|>{call('weather', PARIS, 'parameters')}", "", [("weather", PARIS)]),
    (LLAMA, '\n{"type": "function", "name": "time", "parameters": {}}', "", [("time", "{}")]),
    (LLAMA, f"{call('time', '{}')}; {call('weather', PARIS)}", "", [("time", "{}"), ("weather", PARIS)]),
    (LLAMA, '{"answer": {"name": "time"}} is JSON', '{"answer": {"name": "time"}} is JSON', []),
    (LLAMA, f"text {call('time', '{}')}", f"text {call('time', '{}')}", []),
    (LLAMA, call("nuke", "{}"), call("nuke", "{}"), []),
    (LLAMA, "<|python", "<|python", []),
    (
        MISTRAL,
        f"[TOOL_CALLS] [{call('time', '{}')}, {call('weather', PARIS)}]",
        "",
        [("time", "{}"), ("weather", PARIS)],
    ),
    (MISTRAL, f"So: [TOOL_CALLS][{call('time', '{}')}]</s>", "So:</s>", [("time", "{}")]),
    (MISTRAL, "a [list] of [things", "a [list] of [things", []),
]


@pytest.mark.parametrize(("dialect", "text", "said", "calls"), CASES)
def test_calls_are_found_however_the_text_is_cut(
    dialect: ToolDialect, text: str, said: str, calls: list[tuple[str, str]]
) -> None:
    assert run(parser(dialect), [text]) == (said, calls)
    assert run(parser(dialect), list(text)) == (said, calls)
    for size in (2, 3, 7):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert run(parser(dialect), pieces) == (said, calls)


@given(data=st.data(), case=st.sampled_from(CASES))
def test_any_cut_gives_the_same(data: st.DataObject, case: tuple[ToolDialect, str, str, list[tuple[str, str]]]) -> None:
    dialect, text, said, calls = case
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert run(parser(dialect), pieces) == (said, calls)


SPEECH_AMONG_CALLS = (
    f"a <tool_call>{call('time', '{}')}</tool_call>b<tool_call>{call('weather', PARIS)}</tool_call> c",
    ["a", ("time", "{}"), "b", ("weather", PARIS), " c"],
)


@given(cuts=st.sets(st.integers(0, len(SPEECH_AMONG_CALLS[0]))))
def test_speech_and_calls_keep_their_order(cuts: set[int]) -> None:
    text, expected = SPEECH_AMONG_CALLS
    one = parser()
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(text)])]
    parts = [part for piece in pieces for part in one.push(piece).parts if part != ""]
    found: list[Any] = []
    for part in (*parts, *one.flush().parts):
        if isinstance(part, ToolCallDelta) and part.id is not None:
            found.append((part.name, part.arguments))
        elif isinstance(part, ToolCallDelta):
            name, arguments = found[-1]
            found[-1] = (name, arguments + part.arguments)
        elif isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part:
            found.append(part)
    assert found == expected


@pytest.mark.parametrize("num_chars", range(1, 12))
def test_of_forced_calls_the_beginning_of_another_is_no_speech(num_chars: int) -> None:
    """As the length cuts them."""
    text = f"[{call('time', '{}')}, "
    rest = call("time", "{}")[:num_chars]
    assert run(parser(NONE, ToolMode.REQUIRED), list(text + rest)) == ("", [("time", "{}")])


FRAGMENTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[",
    "]",
    "{",
    "}",
    '"name"',
    ": ",
    '"nuke"',
    ", ",
    " ",
    "\n",
]
FRAGMENTS += ['"arguments"', "<|python_tag|>", "<tool", "x", '{"name": "nuke", "arguments": {}}']


@given(fragments=st.lists(st.sampled_from(FRAGMENTS), max_size=16), dialect=st.sampled_from([HERMES, MISTRAL, LLAMA]))
def test_what_is_no_call_comes_back_whole(fragments: list[str], dialect: ToolDialect) -> None:
    assert run(parser(dialect), fragments) == ("".join(fragments), [])


def test_speech_streams_and_only_a_possible_beginning_is_held_back() -> None:
    one = parser()
    assert one.push("let me <b>").text == "let me <b>"
    assert one.push(" see <tool").text == " see"
    assert one.push("box>").text == " <toolbox>"
    assert one.push(" <tool_call").text == ""


def test_arguments_stream_as_they_come() -> None:
    one = parser()
    first = one.push('<tool_call>{"name": "weather", "arguments": {"ci')
    assert [(d.name, d.arguments) for d in first.calls] == [("weather", ""), (None, '{"ci')]
    assert one.push('ty": "P').calls == (ToolCallDelta(0, 'ty": "P'),)
    assert one.push('"}} </tool_call>').calls == (ToolCallDelta(0, '"}'),)


@pytest.mark.parametrize(
    ("mode", "text", "calls"),
    [
        (ToolMode.REQUIRED, f"[{call('time', '{}')}, {call('weather', PARIS)}]", [("time", "{}"), ("weather", PARIS)]),
        (ToolMode.REQUIRED, call("weather", PARIS), [("weather", PARIS)]),
    ],
)
@pytest.mark.parametrize("dialect", [HERMES, NONE])
def test_forced_calls_need_no_frame(
    mode: ToolMode, text: str, calls: list[tuple[str, str]], dialect: ToolDialect
) -> None:
    assert run(parser(dialect, mode), list(text)) == ("", calls)


def test_without_parallel_calls_the_answer_is_over_after_the_first() -> None:
    one = parser(is_parallel=False)
    text = f"ok <tool_call>{call('time', '{}')}</tool_call><tool_call>{call('weather', PARIS)}</tool_call>"
    parsed = one.push(text)
    assert parsed.text == "ok"
    assert [delta.name for delta in parsed.calls if delta.name] == ["time"]
    assert one.is_finished


def test_ids_are_unique_and_have_the_familys_form() -> None:
    def ids(dialect: ToolDialect, text: str) -> list[str]:
        return [delta.id for delta in parser(dialect).push(text).calls if delta.id]

    hermes = ids(HERMES, f"<tool_call>{call('time', '{}')}{call('time', '{}')}")
    assert len(set(hermes)) == 2
    assert all(one.startswith("call_") for one in hermes)
    (mistral,) = ids(MISTRAL, f"[TOOL_CALLS][{call('time', '{}')}]")
    assert len(mistral) == 9
    assert mistral.isalnum()


def test_no_tools_no_parser() -> None:
    assert parser_for(Tools((TIME,), ToolMode.NONE), HERMES) is None
    assert parser_for(Tools((TIME,)), NONE) is None
    assert json.loads(PARIS)
