"""`/v1/messages` as Anthropic's own client reads it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import pytest
import pytest_asyncio
from anthropic.types import Message
from pydantic import BaseModel

from gateway.text.tokenizer import Tokenizer
from tests.gateway.rest.conftest import Rest, answered
from tests.gateway.rest.routes.test_reasoning import thinking_rest  # noqa: F401  a fixture
from tests.gateway.rest.routes.test_responses import CALL, CITY, say

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOOLS: Any = [{"name": "weather", "description": "tells", "input_schema": CITY, "cache_control": {"type": "ephemeral"}}]
USER: Any = {"role": "user", "content": "weather?"}


@pytest_asyncio.fixture(loop_scope="module")
async def client(tool_rest: Rest) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=tool_rest.base_url, api_key="none", max_retries=0) as client:
        yield client


async def asked(
    rest: Rest, client: anthropic.AsyncAnthropic, tokenizer: Tokenizer, written: str, /, **fields: Any
) -> Message:
    """The message of a model that writes `written`; its stream amounts to the same."""
    fields = {"model": "toy-base", "messages": [USER], "max_tokens": 400, "extra_body": {"temperature": 0}} | fields
    counted = {name: fields[name] for name in ("model", "messages", "tools", "system", "thinking") if name in fields}
    count = (await client.messages.count_tokens(**counted)).input_tokens
    say(rest, tokenizer, written, count)
    whole = await client.messages.create(**fields)
    assert whole.usage.input_tokens == count
    async with client.messages.stream(**fields) as stream:
        events = [event.type async for event in stream]
        streamed = await stream.get_final_message()
    assert events[0] == "message_start"
    assert events[-1] == "message_stop"
    assert normalized(streamed) == normalized(whole)
    return whole


def normalized(message: Message) -> Any:
    content = message.model_dump(exclude={"id", "metrics", "parsed_output"})
    for block in content["content"]:
        block.pop("id", None)
        block.pop("parsed_output", None)
    return content


async def test_text(tool_rest: Rest, client: anthropic.AsyncAnthropic, tokenizer: Tokenizer) -> None:
    message = await asked(tool_rest, client, tokenizer, "the quick fox", system=[{"type": "text", "text": "Be brief."}])
    (block,) = message.content
    assert block.type == "text"
    assert (block.text, message.stop_reason) == ("the quick fox", "end_turn")
    assert message.usage.output_tokens == len(tokenizer.encode("the quick fox")) + 1


@pytest.mark.parametrize(
    ("fields", "reason", "sequence", "text"),
    [
        ({"max_tokens": 2}, "max_tokens", None, None),
        ({"stop_sequences": ["quick"]}, "stop_sequence", "quick", "the "),
    ],
)
async def test_why_it_ended(
    tool_rest: Rest,
    client: anthropic.AsyncAnthropic,
    tokenizer: Tokenizer,
    fields: dict[str, Any],
    reason: str,
    sequence: str | None,
    text: str | None,
) -> None:
    message = await asked(tool_rest, client, tokenizer, "the quick fox", **fields)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    assert text is None or message.content[0].text == text  # type: ignore[union-attr]


async def test_a_tool_round_trip(tool_rest: Rest, client: anthropic.AsyncAnthropic, tokenizer: Tokenizer) -> None:
    message = await asked(tool_rest, client, tokenizer, f"I look.\n{CALL}\n{CALL}", tools=TOOLS)
    said, first, second = message.content
    assert said.type == "text"
    assert first.type == second.type == "tool_use"
    assert (first.name, first.input, message.stop_reason) == ("weather", {"city": "Paris"}, "tool_use")
    results: Any = [
        {"type": "tool_result", "tool_use_id": first.id, "content": "sunny"},
        {"type": "tool_result", "tool_use_id": second.id, "content": [{"type": "text", "text": "warm"}]},
        {"type": "text", "text": "and?", "cache_control": {"type": "ephemeral"}},
    ]
    history: Any = [USER, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    openings: list[Any] = []
    opened = tool_rest.pair.verifier._open
    tool_rest.pair.verifier._open = lambda opening: openings.append(opening) or opened(opening)  # type: ignore
    try:
        await client.messages.create(model="toy-base", messages=history, tools=TOOLS, max_tokens=2)
    finally:
        del tool_rest.pair.verifier._open
    prompt = tokenizer.decode(openings[0].prompt_token_ids)
    assert f"assistant\nI look.\n{CALL}\n{CALL}<|im_end|>" in prompt
    assert "<tool_response>\nsunny\n</tool_response>" in prompt
    assert "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n" in prompt


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
async def test_a_forced_call(
    tool_rest: Rest, client: anthropic.AsyncAnthropic, tokenizer: Tokenizer, choice: Any
) -> None:
    call = '{"name": "weather", "arguments": {"city": "Paris"}}'
    written = f"[{call}]" if choice["type"] == "any" else call
    message = await asked(tool_rest, client, tokenizer, written, tools=TOOLS, tool_choice=choice)
    (block,) = message.content
    assert block.type == "tool_use"
    assert block.input == {"city": "Paris"}


async def test_thinking_is_a_block_of_its_own(thinking_rest: Rest, tokenizer: Tokenizer) -> None:  # noqa: F811
    async with anthropic.AsyncAnthropic(base_url=thinking_rest.base_url, api_key="none") as client:
        enabled = {"type": "enabled", "budget_tokens": 1024}
        message = await asked(thinking_rest, client, tokenizer, "hm</think>\nyes", thinking=enabled)
        thought, said = message.content
        assert thought.type == "thinking"
        assert said.type == "text"
        assert (thought.thinking, said.text) == ("hm", "yes")
        again: Any = [USER, {"role": "assistant", "content": message.content}, USER]
        await client.messages.create(model="toy-base", messages=again, max_tokens=2)
        silent = await asked(thinking_rest, client, tokenizer, "yes", thinking={"type": "disabled"})
        assert [block.type for block in silent.content] == ["text"]


async def test_a_typed_answer(tool_rest: Rest, client: anthropic.AsyncAnthropic, tokenizer: Tokenizer) -> None:
    class City(BaseModel):
        city: str

    fields: Any = {"model": "toy-base", "messages": [USER], "max_tokens": 400, "extra_body": {"temperature": 0}}
    count = (await client.messages.count_tokens(model="toy-base", messages=[USER])).input_tokens
    say(tool_rest, tokenizer, '{"city": "Paris"}', count)
    openings: list[Any] = []
    opened = tool_rest.pair.verifier._open
    tool_rest.pair.verifier._open = lambda opening: openings.append(opening) or opened(opening)  # type: ignore
    try:
        message = await client.messages.parse(output_format=City, **fields)
    finally:
        del tool_rest.pair.verifier._open
    assert message.parsed_output == City(city="Paris")
    assert '"city"' in openings[0].sampling.grammar.text


async def test_what_the_other_services_tools_did_is_left_out_and_an_older_format_taken(
    tool_rest: Rest, tokenizer: Tokenizer
) -> None:
    openings: list[Any] = []
    opened = tool_rest.pair.verifier._open
    tool_rest.pair.verifier._open = lambda opening: openings.append(opening) or opened(opening)  # type: ignore
    blocks = [
        {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "s1", "content": [{"type": "web_search_result"}]},
        {"type": "text", "text": "found it"},
    ]
    body = {
        "messages": [USER, {"role": "assistant", "content": blocks}, USER],
        "max_tokens": 2,
        "output_format": {"type": "json_schema", "schema": {"type": "object", "properties": {"town": {}}}},
    }
    try:
        answered(await tool_rest.http.post("/v1/messages", json=body))
    finally:
        del tool_rest.pair.verifier._open
    assert "assistant\nfound it<|im_end|>" in tokenizer.decode(openings[0].prompt_token_ids)
    assert '"town"' in openings[0].sampling.grammar.text


async def test_a_last_message_of_the_assistant_is_gone_on_with(
    tool_rest: Rest, client: anthropic.AsyncAnthropic, tokenizer: Tokenizer
) -> None:
    messages = [USER, {"role": "assistant", "content": "the quick"}]
    message = await asked(tool_rest, client, tokenizer, " fox", messages=messages)
    assert message.content[0].text == " fox"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"colour": "red"}, "colour"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages"),
    ],
)
async def test_errors_have_anthropics_shape(tool_rest: Rest, fields: dict[str, Any], param: str) -> None:
    body = {"messages": [USER], "max_tokens": 2} | fields
    response = await tool_rest.http.post("/v1/messages", json=body)
    assert response.status_code == 400, response.text
    reply = response.json()
    assert (reply["type"], reply["error"]["type"]) == ("error", "invalid_request_error")
    assert reply["error"]["param"] == param


async def test_errors_have_anthropics_types(tool_rest: Rest, client: anthropic.AsyncAnthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.create(model="gpt-9", messages=[USER], max_tokens=2)
    tool_rest.pair.verifier.delay_s = 0.5
    tool_rest.pair.verifier.error = RuntimeError("a bug")
    with pytest.raises(anthropic.APIStatusError, match="internal error"):
        async with client.messages.stream(model="toy-base", messages=[USER], max_tokens=2) as stream:
            await stream.get_final_message()


async def test_what_is_not_served_is_named(tool_rest: Rest) -> None:
    for path, word in (("/v1/embeddings", "embeddings"), ("/v1/responses/resp_1", "stored"), ("/v1/files", "stored")):
        response = await tool_rest.http.post(path, json={})
        assert response.status_code == 404
        assert word in response.json()["error"]["message"]
    assert answered(await tool_rest.http.get("/version"))


@pytest.mark.parametrize("levels", [0, 1, 3, 7, 12])
async def test_speech_between_calls_stays_there_however_long_the_rounds(
    tool_rest: Rest, client: anthropic.AsyncAnthropic, tokenizer: Tokenizer, levels: int
) -> None:
    speculation = {"mode": "on", "max_levels": levels} if levels else {"mode": "off"}
    body = {"temperature": 0, "speculation": speculation}
    written = f"I look.{CALL}So{CALL}\nis it."
    message = await asked(tool_rest, client, tokenizer, written, tools=TOOLS, extra_body=body)
    shown = [block.text if block.type == "text" else block.type for block in message.content]
    assert shown == ["I look.", "tool_use", "So", "tool_use", "\nis it."]
