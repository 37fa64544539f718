"""A reasoning model over REST: thinking apart from the answer, and everything else for the answer alone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import Thinking
from gateway.text.tokenizer import Tokenizer
from models.recipe.chat import CHAT_TEMPLATE
from tests.fakes.services import ToyLanguage, running_pair
from tests.fakes.tiny_tokenizer import write_tokenizer
from tests.gateway.rest.conftest import Rest, answered, chat_body, serving_rest

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPENING = (
    "{% if add_generation_prompt and (enable_thinking is undefined or enable_thinking) %}{{ '<think>\n' }}"
    "{% elif add_generation_prompt %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def thinking_rest(language: ToyLanguage, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rest]:
    folder = write_tokenizer(tmp_path_factory.mktemp("thinking"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE + OPENING)
    async with running_pair(language) as pair, serving_rest(pair, folder) as rest:
        yield rest


async def said(rest: Rest, tokenizer: Tokenizer, text: str, **fields: Any) -> tuple[dict[str, Any], OpenVerification]:
    """The reply to a model that says `text`, and how its verifier's session was opened; streamed it is the same."""
    body = chat_body(max_tokens=200) | fields
    shown = {name: body[name] for name in ("messages", "tools", "chat_template_kwargs") if name in body}
    count = answered(await rest.http.post("/tokenize", json=shown))["count"]
    token_ids = (5,) * count + tokenizer.encode(text) + (0,) * 400
    openings: list[OpenVerification] = []
    for engine in (rest.pair.verifier, rest.pair.drafter):
        engine.language = replace(engine.language, token_ids=token_ids)
    opened = rest.pair.verifier._open

    def remember(opening: OpenVerification) -> int:
        openings.append(opening)
        return opened(opening)

    rest.pair.verifier._open = remember  # type: ignore[method-assign, assignment]
    try:
        reply = answered(await rest.http.post("/v1/chat/completions", json=body))
        events = await rest.stream("/v1/chat/completions", body)
    finally:
        del rest.pair.verifier._open
    message = reply["choices"][0]["message"]
    deltas = [event["choices"][0]["delta"] for event in events]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == (message.get(name) or "")
    return reply, openings[0]


async def test_thinking_is_apart_and_the_grammar_comes_after_it(thinking_rest: Rest, tokenizer: Tokenizer) -> None:
    text = 'hm {"a"}\n</think>\n\n{"a": 1}'
    reply, opening = await said(thinking_rest, tokenizer, text, response_format=FORM, logprobs=True)
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ('hm {"a"}', '{"a": 1}')
    details = reply["usage"]["completion_tokens_details"]
    assert details == {"reasoning_tokens": len(tokenizer.encode('hm {"a"}\n</think>'))}
    assert len(reply["choices"][0]["logprobs"]["content"]) == len(tokenizer.encode(text))
    grammar = opening.sampling.grammar
    assert grammar is not None
    assert grammar.thinking == Thinking("<think>", "</think>", is_open=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": False},
        {"reasoning_effort": "none"},
        {"thinking": {"type": "disabled"}},
        {"reasoning": {"effort": "none"}},
        {"reasoning": {"enabled": False}},
    ],
)
async def test_without_thinking_the_grammar_begins_at_once(
    thinking_rest: Rest, tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    shown = {"chat_template_kwargs": {"enable_thinking": False}}
    count = answered(await thinking_rest.http.post("/tokenize", json={"messages": chat_body()["messages"]} | shown))
    assert tokenizer.decode(count["tokens"]).endswith("</think>\n\n")
    reply, opening = await said(thinking_rest, tokenizer, '{"a": 1}', response_format=FORM, **fields)
    assert "reasoning_content" not in reply["choices"][0]["message"]
    assert opening.sampling.grammar is not None
    assert opening.sampling.grammar.thinking is None


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_calls_come_after_thinking(thinking_rest: Rest, tokenizer: Tokenizer, choice: str) -> None:
    call = '{"name": "f", "arguments": {"a": 1}}'
    written = f"[{call}]" if choice == "required" else f"<tool_call>{call}</tool_call>"
    text = f"<tool_call>{call}</tool_call>? No.</think>\n{written}"
    reply, opening = await said(thinking_rest, tokenizer, text, tools=TOOLS, tool_choice=choice)
    message = reply["choices"][0]["message"]
    assert message["reasoning_content"] == f"<tool_call>{call}</tool_call>? No."
    assert [one["function"]["arguments"] for one in message["tool_calls"]] == ['{"a": 1}']
    assert message["content"] is None
    assert (opening.sampling.grammar is not None) == (choice == "required")


async def test_thinking_that_is_cut_off_is_thinking(thinking_rest: Rest, tokenizer: Tokenizer) -> None:
    reply, _ = await said(thinking_rest, tokenizer, "hm hm hm", max_tokens=3)
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == ""
    assert "hm hm hm".startswith(choice["message"]["reasoning_content"])
    assert choice["finish_reason"] == "length"
