"""Dialects whose calls are not plain JSON: read the same under every cut; what is not a call comes back whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.generation.answer import AnswerForm, AnswerText
from gateway.text.conversation import ToolDefinition, Tools
from gateway.text.harmony import HarmonyParser
from gateway.text.tokenizer import Tokenizer
from gateway.text.tool_parser import CallParser
from gateway.text.tools import ToolDialect, dialect_of, parser_for

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = (ToolDefinition("weather", "tells", json.dumps(SCHEMA)), ToolDefinition("time"))
CODER, PYTHONIC = ToolDialect.QWEN3_CODER, ToolDialect.PYTHONIC
MISTRAL, HARMONY = ToolDialect.MISTRAL_ARGS, ToolDialect.HARMONY
PARIS = {"city": "Paris", "days": 3}
Heard = tuple[str, str, list[tuple[str, object]]]


def parser(dialect: ToolDialect, is_parallel: bool = True) -> CallParser:
    found = parser_for(Tools(TOOLS, is_parallel=is_parallel), dialect)
    assert found is not None
    return found


def heard(parser: CallParser, pieces: Iterable[str]) -> Heard:
    """What is thought, said, and called."""
    thought, said = "", ""
    calls: dict[int, list[str]] = {}
    for parsed in [*map(parser.push, pieces), parser.flush()]:
        thought, said = thought + parsed.reasoning, said + parsed.text
        for delta in parsed.calls:
            if delta.index not in calls:
                assert delta.id
                calls[delta.index] = [delta.name or "", ""]
            calls[delta.index][1] += delta.arguments
    assert list(calls) == list(range(len(calls)))
    return thought, said, [(name, json.loads(arguments)) for name, arguments in calls.values()]


def coder(city: str, days: object = 3) -> str:
    parameters = f"<parameter=city>\n{city}\n</parameter>\n<parameter=days>\n{days}\n</parameter>\n"
    return f"<tool_call>\n<function=weather>\n{parameters}</function>\n</tool_call>"


ODD = "a<b\n</p>"
TIME = "<tool_call>\n<function=time>\n</function>\n</tool_call>"
MESSAGE = "<|message|>"
CASES: list[tuple[ToolDialect, str, Heard]] = [
    (CODER, "no <call>", ("", "no <call>", [])),
    (CODER, f"I look.\n{coder('Paris')}", ("", "I look.", [("weather", PARIS)])),
    (CODER, f"{coder(ODD)}\n{TIME}\n", ("", "", [("weather", PARIS | {"city": ODD}), ("time", {})])),
    (CODER, coder("Paris", "[1]"), ("", "", [("weather", PARIS | {"days": [1]})])),
    (CODER, coder("Paris", "soon"), ("", "", [("weather", PARIS | {"days": "soon"})])),
    (CODER, coder("Paris").removesuffix("\n</tool_call>"), ("", "", [("weather", PARIS)])),
    (
        CODER,
        "<tool_call>\n<function=nuke>\n</function>\n</tool_call>!",
        ("", "<tool_call>\n<function=nuke>\n</function>\n</tool_call>!", []),
    ),
    (CODER, "<tool_call>\n<function=weather>\n<par", ("", "<tool_call>\n<function=weather>\n<par", [])),
    (PYTHONIC, "[weather(city='Paris', days=3), time()]", ("", "", [("weather", PARIS), ("time", {})])),
    (
        PYTHONIC,
        '<|python_start|>[weather(city="a) ], (", days=3)]<|python_end|>',
        ("", "", [("weather", PARIS | {"city": "a) ], ("})]),
    ),
    (PYTHONIC, "[time()", ("", "[time()", [])),
    (PYTHONIC, "[1, 2]", ("", "[1, 2]", [])),
    (PYTHONIC, "[weather](https://x) is fine", ("", "[weather](https://x) is fine", [])),
    (PYTHONIC, "[nuke()]", ("", "[nuke()]", [])),
    (PYTHONIC, "[weather(city=open('x'))]", ("", "[weather(city=open('x'))]", [])),
    (PYTHONIC, "[weather(city=None, days=true)]", ("", "", [("weather", {"city": None, "days": True})])),
    (MISTRAL, f"So.[TOOL_CALLS]weather[ARGS]{json.dumps(PARIS)}", ("", "So.", [("weather", PARIS)])),
    (
        MISTRAL,
        f"[TOOL_CALLS]weather[CALL_ID]abc123456[ARGS]{json.dumps(PARIS)}[TOOL_CALLS]time[ARGS]{{}}",
        ("", "", [("weather", PARIS), ("time", {})]),
    ),
    (MISTRAL, f"[TOOL_CALLS]weather{json.dumps(PARIS)}", ("", "", [("weather", PARIS)])),
    (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "]"}}]', ("", "", [("weather", {"city": "]"})])),
    (MISTRAL, "[TOOL_CALLS]nuke[ARGS]{}!", ("", "[TOOL_CALLS]nuke[ARGS]{}!", [])),
    (HARMONY, "just text", ("", "just text", [])),
    (HARMONY, f"<|channel|>final{MESSAGE}yes<|return|>", ("", "yes", [])),
    (
        HARMONY,
        f"<|channel|>analysis{MESSAGE}hm <|x<|end|><|start|>assistant<|channel|>final{MESSAGE}yes",
        ("hm <|x", "yes", []),
    ),
    (
        HARMONY,
        f"<|channel|>analysis{MESSAGE}hm<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json{MESSAGE}{json.dumps(PARIS)}<|call|><|start|>assistant to=functions.time"
        f"<|channel|>commentary json{MESSAGE}{{}}<|call|>",
        ("hm", "", [("weather", PARIS), ("time", {})]),
    ),
    (HARMONY, f"<|channel|>commentary{MESSAGE}I look.<|end|>", ("", "I look.", [])),
    (HARMONY, f"<|channel|>commentary to=functions.nuke{MESSAGE}{{}}", ("", "{}", [])),
    (HARMONY, f"<|start|>assistant<|channel|>analysis{MESSAGE}hm", ("hm", "", [])),
]


@pytest.mark.parametrize(("dialect", "text", "expected"), CASES)
def test_what_is_thought_said_and_called(dialect: ToolDialect, text: str, expected: Heard) -> None:
    assert heard(parser(dialect), [text]) == expected
    assert heard(parser(dialect), list(text)) == expected


FRAGMENTS = [
    *(
        "<tool_call>",
        "</tool_call>",
        "\n<function=weather>",
        "</function>\n",
        "<parameter=city>",
        "</parameter>",
        "x",
        " ",
    ),
    *(
        "[",
        "]",
        "weather",
        "(",
        ")",
        "city=",
        "'a'",
        ",",
        "[TOOL_CALLS]",
        "[ARGS]",
        "{}",
        '{"city": "b"}',
        "<|channel|>",
    ),
    *("<|message|>", "<|end|>", "<|call|>", "<|start|>", "analysis", "final", "commentary to=functions.time", "\n"),
]


@given(
    st.sampled_from([CODER, PYTHONIC, MISTRAL, HARMONY]), st.lists(st.sampled_from(FRAGMENTS), max_size=14), st.data()
)
def test_every_cut_reads_the_same(dialect: ToolDialect, fragments: list[str], data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]

    def raw(pieces: list[str]) -> tuple[str, str, str]:
        one = parser(dialect)
        parts = [*map(one.push, pieces), one.flush()]
        calls = [(delta.index, delta.name or "", delta.arguments) for part in parts for delta in part.calls]
        joined = "".join(f"{index}{name}{arguments}" if name else arguments for index, name, arguments in calls)
        return "".join(part.reasoning for part in parts), "".join(part.text for part in parts), joined

    assert raw(pieces) == raw([text])


@given(
    st.sampled_from([CODER, PYTHONIC, MISTRAL]),
    st.lists(st.sampled_from(["<", "a", "[", "weather", "{", "\n", "x "]), max_size=12),
)
def test_what_is_no_call_comes_back_whole(dialect: ToolDialect, fragments: list[str]) -> None:
    assert heard(parser(dialect), fragments) == ("", "".join(fragments), [])


@pytest.mark.parametrize("dialect", [CODER, PYTHONIC, MISTRAL, HARMONY])
def test_without_parallel_calls_there_is_one(dialect: ToolDialect) -> None:
    two = next(text for kind, text, heard in CASES if kind is dialect and len(heard[2]) == 2)
    one = parser(dialect, is_parallel=False)
    assert len(heard(one, [two])[2]) == 1
    assert one.is_finished


@pytest.mark.parametrize("text", ["[" * 10_000, "[f(" + "-" * 10_000, "[weather(city=" + "(" * 300 + ")" * 300 + ")]"])
def test_nothing_is_too_deep(text: str) -> None:
    for dialect in (CODER, PYTHONIC, MISTRAL, HARMONY):
        assert heard(parser(dialect), [text]) == ("", text, [])


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        ("tools <tool_call><function=x><parameter=y>", CODER),
        ("tools <tool_call>{", ToolDialect.HERMES),
        ("tools [TOOL_CALLS]x[ARGS]", MISTRAL),
        ("tools [TOOL_CALLS] [", ToolDialect.MISTRAL),
        ("tools [func_name1(params_name1=params_value1)]", PYTHONIC),
        ("tools <|channel|>", HARMONY),
        ("tools", ToolDialect.LLAMA3_JSON),
        ("<tool_call>", ToolDialect.NONE),
    ],
)
def test_a_template_tells_its_dialect(template: str, dialect: ToolDialect) -> None:
    assert dialect_of(template) is dialect


def test_harmony_is_read_without_tools_and_its_thinking_counted(tokenizer: Tokenizer) -> None:
    assert isinstance(parser_for(None, HARMONY), HarmonyParser)
    text = f"<|channel|>analysis{MESSAGE}hm hm<|end|><|start|>assistant<|channel|>final{MESSAGE}yes"
    token_ids = tokenizer.encode(text)
    for size in (1, 3, 1000):
        answer = AnswerText(tokenizer, AnswerForm(dialect=HARMONY))
        starts = range(0, len(token_ids), size)
        rounds = [answer.push(token_ids[i : i + size], is_last=i + size >= len(token_ids)) for i in starts]
        assert "".join(one.parsed.reasoning for one in rounds) == "hm hm"
        assert "".join(one.parsed.text for one in rounds) == "yes"
        assert 5 <= sum(one.num_reasoning_tokens for one in rounds) < len(token_ids) / 2
