"""What clients replay of earlier answers, and fields that ask for nothing: none of it is refused."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.rest.responses_request import ResponsesRequest
from gateway.text.tokenizer import Tokenizer
from tests.gateway.rest.conftest import Rest, answered, chat_body, completion_body, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def rendered(rest: Rest, tokenizer: Tokenizer, *messages: dict[str, Any]) -> str:
    """The prompt that the messages become."""
    body = answered(await rest.http.post("/tokenize", json={"messages": list(messages)}))
    answered(await rest.http.post("/v1/chat/completions", json=chat_body(messages=list(messages), max_tokens=1)))
    return tokenizer.decode(body["tokens"])


USER = {"role": "user", "content": "weather?"}


def called(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("", '"arguments": {}}'),
        (None, '"arguments": {}}'),
        ('{"city": "Par', '"arguments": {"city": "Par}'),
        ("not JSON", '"arguments": not JSON}'),
        ("[1]", '"arguments": [1]}'),
        ('{"city": "Paris"}', '"arguments": {"city": "Paris"}}'),
        ({"city": "Paris"}, '"arguments": {"city": "Paris"}}'),
        (["Paris"], '"arguments": ["Paris"]}'),
    ],
)
async def test_arguments_of_every_kind(tool_rest: Rest, tokenizer: Tokenizer, arguments: Any, shown: str) -> None:
    text = await rendered(tool_rest, tokenizer, USER, called(arguments), {**USER, "content": "and?"})
    assert f'<tool_call>\n{{"name": "weather", {shown}\n</tool_call>' in text


async def test_calls_as_older_clients_send_them(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{}"}}
    result = {"role": "function", "name": "weather", "content": "sunny"}
    now = [called("{}"), {"role": "tool", "tool_call_id": "1", "content": "sunny"}]
    assert await rendered(tool_rest, tokenizer, USER, call, result) == await rendered(tool_rest, tokenizer, USER, *now)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "sunny", "reasoning_content": "x"},
        {"role": "assistant", "content": "sunny", "reasoning": "x", "refusal": None, "annotations": [{"type": "url"}]},
        {"role": "assistant", "content": "sunny", "tool_calls": [], "audio": None, "function_call": None, "id": "m1"},
        {"role": "assistant", "content": [{"type": "text", "text": "sunny", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "sunny"}]},
        {"role": "assistant", "content": ["sunny"], "reasoning": {"text": "x"}, "thinking": [{"text": "x"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "sunny", "annotations": [], "logprobs": []}]},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "x", "signature": "y"}, {"type": "text", "text": "sunny"}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "y"},
                {"type": "reasoning", "text": "x"},
                {"type": "text", "text": "sunny"},
            ],
        },
        {"role": "assistant", "content": None, "refusal": "sunny"},
        {"role": "assistant", "content": "sunny", "provider_specific_fields": {"a": 1}, "thinking_blocks": [{}]},
        {
            "role": "assistant",
            "content": "sunny",
            "thinking": "x",
            "thought": "y",
            "created_at": 1,
            "metadata": {"a": 1},
        },
        {"role": "assistant", "content": [{"type": "text", "text": "sunny", "citations": [1]}]},
        {
            "role": "assistant",
            "content": [
                {"type": "reasoning", "summary": [{"text": "x"}]},
                {"type": "output_text", "text": "sunny", "x": 1},
            ],
        },
    ],
)
async def test_an_answer_as_it_was_given(rest: Rest, tokenizer: Tokenizer, message: dict[str, Any]) -> None:
    text = await rendered(rest, tokenizer, USER, message, {**USER, "content": "and?"})
    assert text == "[user] weather?\n[assistant] sunny\n[user] and?\n[assistant] "


async def test_what_servers_add_to_calls_is_left_out(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    plain, added = called("{}"), called("{}")
    added["tool_calls"][0] |= {"index": 0, "extra_content": {"google": {}}, "cache_control": {"type": "ephemeral"}}
    added["tool_calls"][0]["function"] |= {"cache_control": {"type": "ephemeral"}, "parsed_arguments": {}}
    result = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
    texts = [
        await rendered(tool_rest, tokenizer, USER, *messages)
        for messages in ((plain, result), (added, {**result, "is_error": True}))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["prefix", "partial"])
async def test_a_wish_in_an_assistants_message_is_refused(rest: Rest, name: str) -> None:
    messages = [USER, {"role": "assistant", "content": "su", name: True}]
    error = refused(await rest.http.post("/v1/chat/completions", json=chat_body(messages=messages)), 400)
    assert error["param"] == f"messages[1].{name}"
    assert "continue_final_message" in error["message"]


@pytest.mark.parametrize(
    "content", ["", None, [], [{"type": "text", "text": ""}], [{"type": "text", "text": None}], [{"type": "text"}]]
)
@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
async def test_empty_contents(rest: Rest, tokenizer: Tokenizer, role: str, content: Any) -> None:
    shown = "system" if role == "developer" else role
    text = await rendered(rest, tokenizer, {"role": role, "content": content}, USER)
    assert text == f"[{shown}] \n[user] weather?\n[assistant] "


async def test_a_wrong_part_is_named(rest: Rest) -> None:
    body = chat_body(messages=[{"role": "user", "content": [{"type": "text", "text": "x", "colour": "red"}]}])
    error = refused(await rest.http.post("/v1/chat/completions", json=body), 400)
    assert (error["param"], error["code"]) == ("messages[0].content[0].colour", "unknown_parameter")


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1},
        {"min_tokens": 0},
        {"include_stop_str_in_output": False},
        {"length_penalty": 1.0, "use_beam_search": False, "early_stopping": False},
        {"spaces_between_special_tokens": True, "skip_special_tokens": True, "detokenize": True},
        {"bad_words": [], "functions": [], "prediction": None, "logits_processors": None},
        {"made_up": None, "another": False, "third": 0, "fourth": "", "fifth": {}, "sixth": 0.0},
        {"stream_options": None, "verbosity": "medium", "truncate_prompt_tokens": -1},
        {"stream_options": {}, "stop": "", "top_logprobs": 0, "tools": [], "tool_choice": "auto"},
        {"stream_options": {"include_usage": False}, "stop": [""], "store": True, "service_tier": "flex"},
        {"cache_prompt": True, "repeat_penalty": 1.0, "repeat_last_n": 64, "function_call": "auto"},
        {"thinking": {"type": "disabled"}, "usage": {"include": True}},
        {"reasoning": {"effort": "none"}, "enable_thinking": False},
        {"reasoning": {"effort": None, "summary": None}, "enable_thinking": True},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "truncation": "disabled"},
        {"n_predict": -1, "id_slot": -1, "num_return_sequences": 1, "route": "fallback"},
    ],
)
async def test_what_asks_for_nothing_is_taken(rest: Rest, fields: dict[str, Any]) -> None:
    plain, asked = await rest.chat(max_tokens=5), await rest.chat(max_tokens=5, **fields)
    assert asked["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"logprobs": False, "best_of": 0, "tool_choice": "none", "parallel_tool_calls": True}),
        ("/v1/completions", {"chat_template_kwargs": {"enable_thinking": False}, "add_generation_prompt": True}),
        *(
            (path, {"store": True, "service_tier": "default", "prompt_cache_key": "x", "safety_identifier": "x"})
            for path in ("/v1/completions", "/v1/responses", "/v1/messages")
        ),
        ("/v1/responses", {"modalities": ["text"], "prompt_cache_retention": "24h"}),
        ("/v1/messages", {"modalities": ["text"], "parallel_tool_calls": True, "text": {"verbosity": "medium"}}),
    ],
)
async def test_what_asks_for_nothing_is_taken_everywhere(rest: Rest, path: str, fields: dict[str, Any]) -> None:
    body = {
        "/v1/completions": {"prompt": "hello", "max_tokens": 2},
        "/v1/responses": {"input": "hello", "max_output_tokens": 2},
        "/v1/messages": chat_body(max_tokens=2),
    }[path]
    answered(await rest.http.post(path, json=body | fields))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"options": {"temperature": 0}}, "options"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"reasoning": {"enabled": True}}, "reasoning"),
        ({"made_up": 1}, "made_up"),
        ({"made_up": True}, "made_up"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": True}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"spaces_between_special_tokens": 1}, "spaces_between_special_tokens"),
    ],
)
async def test_what_asks_for_something_is_named(rest: Rest, fields: dict[str, Any], param: str) -> None:
    error = refused(await rest.http.post("/v1/chat/completions", json=chat_body(**fields)), 400)
    assert error["param"] == param


async def test_results_of_tools_may_be_objects(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    as_text, as_object = (
        {"role": "tool", "tool_call_id": "1", "content": content} for content in ('{"sun": 1}', {"sun": 1})
    )
    texts = [await rendered(tool_rest, tokenizer, USER, called("{}"), one) for one in (as_text, as_object)]
    assert texts[0] == texts[1]
    assert '{"sun": 1}' in texts[0]


async def test_calls_of_any_kind_in_the_forms_of_other_routes(tool_rest: Rest) -> None:
    call = {"type": "function_call", "call_id": "1", "name": "weather", "arguments": {"city": "Paris"}}
    result = {"type": "function_call_output", "call_id": "1", "output": "sunny"}
    body = {"input": [USER, call, result], "max_output_tokens": 2}
    answered(await tool_rest.http.post("/v1/responses", json=body))
    block = {"type": "tool_use", "id": "1", "name": "weather"}
    for written in ('{"city": "Par', {"city": "Paris"}, "", None):
        history = [USER, {"role": "assistant", "content": [block | {"input": written}]}, USER]
        answered(await tool_rest.http.post("/v1/messages", json={"messages": history, "max_tokens": 2}))


@pytest.mark.parametrize("kind", [{}, [], 1])
async def test_types_that_are_no_text_are_named(rest: Rest, kind: Any) -> None:
    wrong = {"type": kind, "text": "x"}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": [wrong]}], "max_tokens": 2}
    for path in ("/v1/messages", "/v1/chat/completions"):
        assert (await rest.http.post(path, json=body)).status_code == 400
    for items in ([wrong], [{"role": "user", "content": [wrong]}]):
        refused(await rest.http.post("/v1/responses", json={"input": items}), 400)


async def test_usage_in_every_chunk(rest: Rest) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (
        ("/v1/chat/completions", chat_body(n=2, stream_options=options)),
        ("/v1/completions", completion_body(n=2, echo=True, stream_options=options)),
    ):
        events = await rest.stream(path, body)
        usages = [event["usage"] for event in events]
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
        assert len(set(counts)) > 3
        assert {usage["prompt_tokens"] for usage in usages} == {usages[-1]["prompt_tokens"]}
        assert usages[-1].items() >= usages[-2].items()
        assert counts[-1] == 120


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": {"text": []}}]}]}),
        ("/v1/responses", {"input": [{"type": {"message": []}, "role": "user", "content": "hi"}]}),
    ],
)
async def test_a_type_that_is_no_text_is_refused(rest: Rest, path: str, body: dict[str, Any]) -> None:
    assert (await rest.http.post(path, json=body)).status_code == 400


async def test_all_that_was_thought_between_two_results_is_kept() -> None:
    def thought(text: str) -> dict[str, Any]:
        return {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}

    def call(name: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": name, "name": name, "arguments": "{}"}

    items = [USER, thought("which?"), call("a"), thought(""), thought("both"), call("b")]
    (_, turn) = ResponsesRequest.model_validate({"input": items}).prompt_conversation(lambda _: None).turns
    assert (turn.reasoning, [each.name for each in turn.tool_calls]) == ("which?\nboth", ["a", "b"])
