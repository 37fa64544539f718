"""Tools over REST: what the model is shown, what is read from its answer, and what is forced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import GrammarKind
from gateway.text.tokenizer import Tokenizer
from tests.fakes.servers import eventually
from tests.gateway.rest.conftest import Rest, answered, chat_body, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "$defs": {"City": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "tells", "parameters": CITY, "strict": True}},
    {"type": "function", "function": {"name": "time"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'


def tool_body(**fields: Any) -> dict[str, Any]:
    return chat_body(tools=TOOLS, max_tokens=400) | fields


async def say(rest: Rest, tokenizer: Tokenizer, text: str, body: dict[str, Any]) -> None:
    """Have the fakes say `text`, and then end, in answer to `body`."""
    shown = {name: body[name] for name in ("messages", "tools") if name in body}
    if body.get("tool_choice") == "none":
        del shown["tools"]
    count = answered(await rest.http.post("/tokenize", json=shown))["count"]
    token_ids = (5,) * count + tokenizer.encode(text) + (0,) * 400
    for engine in (rest.pair.verifier, rest.pair.drafter):
        engine.language = replace(engine.language, token_ids=token_ids)


async def answer(rest: Rest, tokenizer: Tokenizer, text: str, **fields: Any) -> tuple[dict[str, Any], str]:
    """(message, finish reason) of an answer that says `text`; checks that its stream amounts to the same."""
    body = tool_body(**fields)
    await say(rest, tokenizer, text, body)
    (choice,) = answered(await rest.http.post("/v1/chat/completions", json=body))["choices"]
    streamed, reason = joined(await rest.stream("/v1/chat/completions", body))
    message = choice["message"]
    for call in [*message.get("tool_calls", []), *streamed.get("tool_calls", [])]:
        assert call.pop("id").startswith("call_")
    assert streamed == {name: value for name, value in message.items() if name != "refusal"}
    assert reason == choice["finish_reason"]
    return message, reason


def joined(events: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """What a client makes of a stream's deltas."""
    message: dict[str, Any] = {"content": ""}
    calls: list[dict[str, Any]] = []
    reason = ""
    for event in events:
        (choice,) = event["choices"]
        delta = dict(choice["delta"])
        message["role"] = delta.pop("role", message.get("role"))
        message["content"] += delta.pop("content", "")
        pieces = delta.pop("tool_calls", [])
        assert len(pieces) <= 1  # some clients read no further
        for piece in pieces:
            if piece["index"] == len(calls):
                calls.append({"id": piece["id"], "type": piece["type"], "function": dict(piece["function"])})
            else:
                assert list(piece) == ["index", "function"]
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
        assert delta == {}
        reason = choice["finish_reason"] or reason
    if calls:
        message = {"role": message["role"], "content": message["content"] or None, "tool_calls": calls}
    return message, reason


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


async def test_a_call_is_read_from_what_the_model_writes(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    message, reason = await answer(tool_rest, tokenizer, CALL)
    assert message["content"] is None
    assert message["tool_calls"] == [call("weather", '{"city": "Paris"}')]
    assert reason == "tool_calls"


async def test_speech_and_several_calls(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    message, reason = await answer(tool_rest, tokenizer, f"I look <that> up.\n{CALL}\n{TIME}")
    assert message["content"] == "I look <that> up."
    assert message["tool_calls"] == [call("weather", '{"city": "Paris"}'), call("time", "{}")]
    assert reason == "tool_calls"


async def test_without_parallel_calls_the_answer_ends_with_the_first(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    message, reason = await answer(tool_rest, tokenizer, f"{TIME}\n{CALL}", parallel_tool_calls=False)
    assert message["tool_calls"] == [call("time", "{}")]
    assert reason == "tool_calls"
    await eventually(tool_rest.is_idle)


async def test_a_call_cut_by_the_length_is_not_passed_off_as_one(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    message, reason = await answer(tool_rest, tokenizer, CALL, max_tokens=len(tokenizer.encode(CALL)) - 22)
    (cut,) = message["tool_calls"]
    assert CALL.count(cut["function"]["arguments"]) == 1
    assert reason == "length"


@pytest.mark.parametrize("text", ["no call here", '<tool_call>{"name": "nuke", "arguments": {}}</tool_call>'])
async def test_what_is_no_call_is_speech(tool_rest: Rest, tokenizer: Tokenizer, text: str) -> None:
    message, reason = await answer(tool_rest, tokenizer, text)
    assert message == {"role": "assistant", "content": text, "refusal": None}
    assert reason == "stop"


async def test_with_none_tools_are_neither_shown_nor_called(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    message, reason = await answer(tool_rest, tokenizer, CALL, tool_choice="none")
    assert (message["content"], reason) == (CALL, "stop")


async def test_tools_calls_and_results_go_through_the_template(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    body = answered(await tool_rest.http.post("/tokenize", json={"messages": messages, "tools": TOOLS}))
    text = tokenizer.decode(body["tokens"])
    for part in ("Be brief.", json.dumps(CITY), CALL, "<tool_response>\nsunny\n</tool_response>"):
        assert part in text
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("choice", "is_parallel", "text", "calls"),
    [
        ("required", None, '[{"name": "time", "arguments": {}}]', [call("time", "{}")]),
        ("required", False, '{"name": "time", "arguments": {}}', [call("time", "{}")]),
        (
            {"type": "function", "function": {"name": "weather"}},
            None,
            '{"name": "weather", "arguments": {"city": "P"}}',
            [call("weather", '{"city": "P"}')],
        ),
    ],
)
async def test_a_forced_call_is_put_under_a_grammar(
    tool_rest: Rest, tokenizer: Tokenizer, choice: Any, is_parallel: bool | None, text: str, calls: list[Any]
) -> None:
    fields = {"tool_choice": choice, "parallel_tool_calls": is_parallel}
    openings: list[OpenVerification] = []
    verifier = tool_rest.pair.verifier
    opened = verifier._open

    def remember(opening: OpenVerification) -> int:
        openings.append(opening)
        return opened(opening)

    verifier._open = remember  # type: ignore[method-assign, assignment]
    try:
        message, reason = await answer(tool_rest, tokenizer, text, **fields)
    finally:
        del verifier._open
    assert (message["content"], message["tool_calls"], reason) == (None, calls, "tool_calls")
    grammar = openings[0].sampling.grammar
    assert grammar is not None
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    schema = json.loads(grammar.text)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(text), schema)
    wrong = text.replace("weather", "nuke").replace("time", "nuke")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(wrong), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(text.replace('"P"', "7").replace('"time"', '"weather", "x": 1')), schema)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


async def test_of_all_tools_that_are_shown_only_the_allowed_are_called(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    message, _ = await answer(tool_rest, tokenizer, CALL, tool_choice=allowed("auto", "weather"))
    assert message["tool_calls"] == [call("weather", '{"city": "Paris"}')]
    message, reason = await answer(tool_rest, tokenizer, CALL, tool_choice=allowed("auto", "time"))
    assert (message["content"], reason) == (CALL, "stop")
    text = '[{"name": "time", "arguments": {}}]'
    message, _ = await answer(tool_rest, tokenizer, text, tool_choice=allowed("required", "time"))
    assert message["tool_calls"] == [call("time", "{}")]


async def test_a_custom_tools_call_in_a_history_is_a_call(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    made = {"id": "1", "type": "custom", "custom": {"name": "shell", "input": "ls -l"}}
    messages = [
        {"role": "user", "content": "list"},
        {"role": "assistant", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "1", "content": "a.txt"},
    ]
    body = answered(await tool_rest.http.post("/tokenize", json={"messages": messages, "tools": TOOLS}))
    text = tokenizer.decode(body["tokens"])
    assert "shell" in text
    assert "ls -l" in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": allowed("auto", "nuke")}, "tool_choice"),
        ({"tools": None, "tool_choice": allowed("required", "time")}, "tool_choice"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools[1].name"),
        ({"tool_choice": {"type": "function", "function": {"name": "nuke"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ],
)
async def test_what_is_not_allowed_is_named(tool_rest: Rest, fields: dict[str, Any], param: str) -> None:
    error = refused(await tool_rest.http.post("/v1/chat/completions", json=tool_body(**fields)), 400)
    assert error["param"] == param, error


async def test_to_a_template_that_knows_no_tools_they_are_described(rest: Rest, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "tool_calls": [{"id": "1", **call("weather", '{"city": "Paris"}')}]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "2", "content": "warm"},
    ]
    body = answered(await rest.http.post("/tokenize", json={"messages": messages, "tools": TOOLS}))
    text = tokenizer.decode(body["tokens"])
    assert text.startswith("[system] You can call functions.")
    assert json.dumps(CITY) in text
    assert f"[assistant] {CALL}\n[user] <tool_response>\nsunny\n</tool_response>\n<tool_response>\nwarm" in text
    message, reason = await answer(rest, tokenizer, f"Let me see.\n{CALL}")
    assert (message["content"], message["tool_calls"]) == ("Let me see.", [call("weather", '{"city": "Paris"}')])
    assert reason == "tool_calls"


async def test_a_call_is_forced_without_a_template_that_knows_tools(rest: Rest, tokenizer: Tokenizer) -> None:
    text = '[{"name": "weather", "arguments": {"city": "Paris"}}]'
    message, _ = await answer(rest, tokenizer, text, tool_choice="required")
    assert message["tool_calls"] == [call("weather", '{"city": "Paris"}')]


UNIQUE = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}


@pytest.mark.parametrize(("text", "is_valid"), [('["a", "b"]', True), ('["a", "a"]', False), ('["a", "a', None)])
async def test_what_no_grammar_enforces_is_checked_and_told(
    rest: Rest, tokenizer: Tokenizer, text: str, is_valid: bool | None
) -> None:
    body = chat_body(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": UNIQUE}})
    body["max_tokens"] = len(tokenizer.encode(text)) + (is_valid is not None)
    await say(rest, tokenizer, text, body)
    (choice,) = answered(await rest.http.post("/v1/chat/completions", json=body))["choices"]
    assert choice["schema_check"]["unenforced"] == ["uniqueItems"]
    assert choice["schema_check"]["valid"] is is_valid
    (last,) = (await rest.stream("/v1/chat/completions", body))[-1]["choices"]
    assert last["schema_check"] == choice["schema_check"]
    strict = {"type": "json_schema", "json_schema": {"name": "x", "schema": UNIQUE, "strict": True}}
    error = refused(await rest.http.post("/v1/chat/completions", json=body | {"response_format": strict}), 400)
    assert error["param"] == "response_format"
    assert "uniqueItems" in error["message"]


async def test_arguments_of_a_forced_call_are_checked_too(rest: Rest, tokenizer: Tokenizer) -> None:
    parameters = {"type": "object", "properties": {"tags": UNIQUE}}
    body = tool_body(
        tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}],
        tool_choice={"type": "function", "function": {"name": "f"}},
    )
    await say(rest, tokenizer, '{"name": "f", "arguments": {"tags": ["a", "a"]}}', body)
    (choice,) = answered(await rest.http.post("/v1/chat/completions", json=body))["choices"]
    assert choice["schema_check"]["valid"] is False
    body["tools"][0]["function"]["strict"] = True
    assert refused(await rest.http.post("/v1/chat/completions", json=body), 400)["param"] == "tools"


async def test_a_forced_call_follows_the_anchors_of_its_schema(rest: Rest, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#b"}}, "$defs": {"b": {"$anchor": "b", "enum": ["x"]}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    named = {"type": "function", "function": {"name": "f"}}
    message, _ = await answer(
        rest, tokenizer, '{"name": "f", "arguments": {"a": "x"}}', tools=[tool], tool_choice=named
    )
    assert message["tool_calls"] == [call("f", '{"a": "x"}')]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"max_completion_tokens": 0, "max_tokens": None}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages"),
    ],
)
async def test_an_error_names_the_field_that_was_sent(rest: Rest, fields: dict[str, Any], param: str) -> None:
    error = refused(await rest.http.post("/v1/chat/completions", json=chat_body(**fields)), 400)
    assert error["param"] == param
