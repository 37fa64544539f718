"""`/v1/responses` as OpenAI's own client reads it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types.responses import Response
from pydantic import BaseModel

from gateway.text.tokenizer import Tokenizer
from tests.gateway.rest.conftest import Rest, answered, refused
from tests.gateway.rest.routes.test_reasoning import thinking_rest  # noqa: F401  a fixture

pytestmark = pytest.mark.asyncio(loop_scope="module")

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "name": "weather", "description": "tells", "parameters": CITY, "strict": True}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest_asyncio.fixture(loop_scope="module")
async def client(tool_rest: Rest) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{tool_rest.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def say(rest: Rest, tokenizer: Tokenizer, text: str, num_prompt_tokens: int) -> None:
    """Have the fakes say `text` and then end, after so many tokens."""
    token_ids = (5,) * num_prompt_tokens + tokenizer.encode(text) + (0,) * 800
    for engine in (rest.pair.verifier, rest.pair.drafter):
        engine.language = replace(engine.language, token_ids=token_ids)


async def asked(rest: Rest, client: openai.AsyncOpenAI, tokenizer: Tokenizer, text: str, /, **fields: Any) -> Response:
    """The response to a model that says `text`; its stream amounts to the same."""
    fields = {"model": "toy-base", "input": "hello", "temperature": 0, "max_output_tokens": 400} | fields
    say(rest, tokenizer, "x", 0)
    first = await client.responses.create(**(fields | {"max_output_tokens": 1, "tool_choice": "auto", "text": {}}))
    assert first.usage is not None
    say(rest, tokenizer, text, first.usage.input_tokens)
    whole = await client.responses.create(**fields)
    events = [event async for event in await client.responses.create(stream=True, **fields)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last: Any = events[-1]
    assert normalized(last.response) == normalized(whole)
    check_events(events, whole)
    return whole


def normalized(response: Response) -> Any:
    content = response.model_dump(exclude={"id", "created_at", "completed_at", "metrics"})
    for item in content["output"]:
        assert item.pop("id")
        item.pop("call_id", None)
    return content


def check_events(events: list[Any], whole: Response) -> None:
    """Items open and close in order, and their deltas are what they are."""
    texts: dict[str, str] = {}
    opened: list[str] = []
    for event in events:
        if event.type == "response.output_item.added":
            opened.append(event.item.id)
            assert event.item.status == "in_progress"
            assert event.output_index == len(opened) - 1
        elif event.type.endswith(".delta"):
            assert event.item_id == opened[-1]
            texts[event.item_id] = texts.get(event.item_id, "") + event.delta
        elif event.type in ("response.output_text.done", "response.reasoning_text.done"):
            assert texts.get(event.item_id, "") == event.text
        elif event.type == "response.function_call_arguments.done":
            assert texts.get(event.item_id, "") == event.arguments
        elif event.type == "response.output_item.done":
            assert event.item.id == opened[-1]
    assert len(opened) == len(whole.output)


async def test_text(tool_rest: Rest, client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    response = await asked(tool_rest, client, tokenizer, "the quick brown fox", instructions="Be brief.")
    assert response.output_text == "the quick brown fox"
    assert (response.status, response.incomplete_details) == ("completed", None)
    assert response.usage is not None
    assert response.usage.output_tokens == len(tokenizer.encode("the quick brown fox")) + 1
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.output_tokens_details.reasoning_tokens == 0


async def test_a_cut_text_is_incomplete(tool_rest: Rest, client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    response = await asked(tool_rest, client, tokenizer, "the quick brown fox", max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"  # type: ignore[union-attr]


async def test_a_tool_round_trip(tool_rest: Rest, client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    response = await asked(tool_rest, client, tokenizer, f"I look.\n{CALL}\n{CALL}", tools=TOOLS)
    said, first, second = response.output
    assert said.type == "message"
    assert response.output_text == "I look."
    assert first.type == second.type == "function_call"
    assert (first.name, first.arguments) == ("weather", '{"city": "Paris"}')
    history: Any = [
        {"role": "user", "content": "weather?"},
        *[item.model_dump(exclude_none=True) for item in response.output],
        {"type": "function_call_output", "call_id": first.call_id, "output": "sunny"},
        {"type": "function_call_output", "call_id": second.call_id, "output": [{"type": "input_text", "text": "warm"}]},
    ]
    openings: list[Any] = []
    opened = tool_rest.pair.verifier._open
    tool_rest.pair.verifier._open = lambda opening: openings.append(opening) or opened(opening)  # type: ignore
    try:
        after = await client.responses.create(model="toy-base", input=history, tools=TOOLS, max_output_tokens=3)
    finally:
        del tool_rest.pair.verifier._open
    assert after.usage is not None
    prompt = tokenizer.decode(openings[0].prompt_token_ids)
    assert f"assistant\nI look.\n{CALL}\n{CALL}<|im_end|>" in prompt
    assert "<tool_response>\nsunny\n</tool_response>" in prompt
    assert "<tool_response>\nwarm\n</tool_response>" in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
async def test_a_forced_call(tool_rest: Rest, client: openai.AsyncOpenAI, tokenizer: Tokenizer, choice: Any) -> None:
    call = '{"name": "weather", "arguments": {"city": "Paris"}}'
    text = f"[{call}]" if choice == "required" else call
    response = await asked(tool_rest, client, tokenizer, text, tools=TOOLS, tool_choice=choice)
    (item,) = response.output
    assert item.type == "function_call"
    assert item.arguments == '{"city": "Paris"}'


async def test_only_allowed_tools_are_called(tool_rest: Rest, client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    text = '[{"name": "weather", "arguments": {"city": "Paris"}}]'
    response = await asked(tool_rest, client, tokenizer, text, tools=TOOLS, tool_choice=choice)
    assert [item.type for item in response.output] == ["function_call"]
    other = {**TOOLS[0], "name": "other"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}
    response = await asked(tool_rest, client, tokenizer, CALL, tools=[*TOOLS, other], tool_choice=choice)
    assert response.output_text == CALL


async def test_what_other_servers_tools_did_is_left_out_of_a_history(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    openings: list[Any] = []
    opened = tool_rest.pair.verifier._open
    tool_rest.pair.verifier._open = lambda opening: openings.append(opening) or opened(opening)  # type: ignore
    items = [
        {"role": "user", "content": "list"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"query": "x"}},
        {"type": "custom_tool_call", "call_id": "c1", "name": "shell", "input": "ls -l", "id": "ct_1"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "a.txt"},
        {"type": "compaction", "encrypted_content": "zzz"},
    ]
    body = {"input": items, "max_output_tokens": 2, "client_metadata": {"a": "b"}}
    try:
        answered(await tool_rest.http.post("/v1/responses", json=body))
    finally:
        del tool_rest.pair.verifier._open
    prompt = tokenizer.decode(openings[0].prompt_token_ids)
    assert "ls -l" in prompt
    assert "<tool_response>\na.txt\n</tool_response>" in prompt


async def test_a_typed_answer(tool_rest: Rest, client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    class City(BaseModel):
        city: str

    form = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    response = await asked(tool_rest, client, tokenizer, '{"city": "Paris"}', text=form)
    parsed = await client.responses.parse(
        model="toy-base", input="hello", text_format=City, temperature=0, max_output_tokens=400
    )
    assert json.loads(response.output_text) == {"city": "Paris"}
    assert parsed.output_parsed == City(city="Paris")
    async with client.responses.stream(model="toy-base", input="hello", text_format=City, temperature=0) as stream:
        assert (await stream.get_final_response()).output_parsed == City(city="Paris")


async def test_logprobs(tool_rest: Rest, client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    include = ["message.output_text.logprobs"]
    response = await asked(tool_rest, client, tokenizer, "the fox", include=include, top_logprobs=2)
    part = response.output[0].content[0]  # type: ignore[union-attr,index]
    assert "".join(one.token for one in part.logprobs or ()) == "the fox"  # type: ignore[union-attr]


async def test_thinking_is_an_item_of_its_own(thinking_rest: Rest, tokenizer: Tokenizer) -> None:  # noqa: F811
    async with openai.AsyncOpenAI(base_url=f"{thinking_rest.base_url}/v1", api_key="none") as client:
        response = await asked(thinking_rest, client, tokenizer, "hm</think>\nyes")
    thought, said = response.output
    assert thought.type == "reasoning"
    assert [part.text for part in thought.content or ()] == ["hm"]
    assert response.output_text == "yes"
    assert said.type == "message"
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens > 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "any"}}}}, None),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x" * 9000}, "input"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"colour": "red"}, "colour"),
        ({"n": 2}, "n"),
    ],
)
async def test_what_is_not_allowed_is_named(tool_rest: Rest, fields: dict[str, Any], param: str | None) -> None:
    response = await tool_rest.http.post("/v1/responses", json={"input": "hello", "max_output_tokens": 2} | fields)
    if param is None:
        return  # the fakes take any grammar
    assert refused(response, 400)["param"] == param


async def test_what_clients_send_along_is_taken(tool_rest: Rest) -> None:
    body = {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}],
        "store": True,
        "truncation": "auto",
        "include": ["reasoning.encrypted_content"],
        "previous_response_id": None,
        "background": False,
        "reasoning": {"effort": "none", "summary": "auto"},
        "text": {"verbosity": "medium"},
        "metadata": {"a": "b"},
        "prompt_cache_key": "x",
        "safety_identifier": "y",
        "user": "z",
        "tools": [],
        "max_output_tokens": 2,
    }
    reply = answered(await tool_rest.http.post("/v1/responses", json=body))
    assert (reply["store"], reply["metadata"], reply["truncation"]) == (False, {"a": "b"}, "auto")


async def test_a_failure_in_a_stream_is_an_event(tool_rest: Rest, client: openai.AsyncOpenAI) -> None:
    tool_rest.pair.verifier.delay_s = 0.5
    tool_rest.pair.verifier.error = RuntimeError("a bug")
    events = [event async for event in await client.responses.create(model="toy-base", input="x", stream=True)]
    error, failed = events[-2:]
    assert error.type == "error"
    assert error.code == "internal_error"
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"


@pytest.mark.parametrize("levels", [0, 1, 3, 7, 12])
async def test_speech_between_calls_stays_there_however_long_the_rounds(
    tool_rest: Rest, client: openai.AsyncOpenAI, tokenizer: Tokenizer, levels: int
) -> None:
    speculation = {"mode": "on", "max_levels": levels} if levels else {"mode": "off"}
    text = f"I look.{CALL}So{CALL}\nis it."
    response = await asked(
        tool_rest, client, tokenizer, text, tools=TOOLS, extra_body={"speculation": speculation, "top_logprobs": 0}
    )
    shown = [item.content[0].text if item.type == "message" else item.type for item in response.output]  # type: ignore[union-attr]
    assert shown == ["I look.", "function_call", "So", "function_call", "\nis it."]


async def test_items_of_answers_can_be_referred_to(tool_rest: Rest, tokenizer: Tokenizer) -> None:
    def user(text: str) -> dict[str, Any]:
        return {"role": "user", "content": text}

    async def post(**fields: Any) -> Any:
        return await tool_rest.http.post(
            "/v1/responses", json={"max_output_tokens": 20, "temperature": 0, "input": [user("hello")], **fields}
        )

    count = (await post(tools=TOOLS, max_output_tokens=1)).json()["usage"]["input_tokens"]
    say(tool_rest, tokenizer, f"I look.{CALL}", count)
    said = (await post(tools=TOOLS, max_output_tokens=200)).json()["output"]
    assert [item["type"] for item in said] == ["message", "function_call"]
    result = {"output": "sunny", "type": "function_call_output", "call_id": "1"}
    whole, referred = [
        (await post(input=[user("hello"), *items, result, user("and?")])).json()
        for items in (said, [{"type": "item_reference", "id": item["id"]} for item in said])
    ]
    assert referred["usage"]["input_tokens"] == whole["usage"]["input_tokens"]
    streamed = json.loads((await post(stream=True)).text.rpartition("data: ")[2])["response"]["output"][0]
    hidden = (await post(store=False)).json()["output"]
    for item, status in ((streamed, 200), (hidden[0], 400), ({"id": "msg_1"}, 400), ({"id": None}, 400)):
        reply = await post(input=[{"type": "item_reference", "id": item["id"]}, user("and?")])
        assert reply.status_code == status, reply.text
        if status == 400:
            assert reply.json()["error"]["param"] == "input[0].id"
            assert "store" in reply.json()["error"]["message"]
