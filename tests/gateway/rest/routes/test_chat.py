"""`/v1/chat/completions`, `/tokenize` and `/detokenize` over fakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.text.tokenizer import Tokenizer
from tests.gateway.rest.conftest import Rest, answered, chat_body, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")

RENDERED = "[user] hello\n[assistant] "


async def test_an_answer_has_openais_shape(rest: Rest, tokenizer: Tokenizer) -> None:
    body = await rest.chat()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert list(choice) == ["index", "message", "logprobs", "finish_reason"]
    assert list(choice["message"]) == ["role", "content", "refusal"]
    assert choice["message"]["role"] == "assistant"
    prompt_ids = tokenizer.encode(RENDERED)
    continued = (await rest.completion(prompt=list(prompt_ids)))["choices"][0]
    assert choice["message"]["content"] == continued["text"]
    assert choice["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == len(prompt_ids)


async def test_a_stream_begins_with_the_role_and_ends_with_the_reason(rest: Rest) -> None:
    whole = await rest.chat(n=2)
    events = await rest.stream("/v1/chat/completions", chat_body(n=2, stream_options={"include_usage": True}))
    *chunks, last = events
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for index in range(2):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert choices[-1]["delta"] == {}
        assert choices[-1]["finish_reason"] == "length"
        assert all(list(choice["delta"]) == ["content"] for choice in choices[1:-1])
        assert all(choice["finish_reason"] is None for choice in choices[:-1])
        text = "".join(choice["delta"]["content"] for choice in choices[:-1])
        assert text == whole["choices"][index]["message"]["content"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "[user] a\nb\n",
        ),
        (
            [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi", "name": "bob"}],
            "[system] be brief\n[user] hi\n",
        ),
        (
            [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "ho", "refusal": None, "annotations": []},
                {"role": "user", "content": "he"},
            ],
            "[user] hi\n[assistant] ho\n[user] he\n",
        ),
    ],
)
async def test_messages_are_rendered_with_the_template(
    rest: Rest, tokenizer: Tokenizer, messages: list[Any], rendered: str
) -> None:
    body = answered(await rest.http.post("/tokenize", json={"messages": messages}))
    assert tokenizer.decode(body["tokens"]) == f"{rendered}[assistant] "
    assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 2048)
    told = await rest.chat(messages=messages)
    assert told["usage"]["prompt_tokens"] == body["count"]


async def test_the_assistants_turn_may_be_left_out_or_continued(rest: Rest, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I say"}]

    async def rendered(**fields: Any) -> str:
        body = answered(await rest.http.post("/tokenize", json={"messages": messages} | fields))
        return tokenizer.decode(body["tokens"])

    assert await rendered(add_generation_prompt=False) == "[user] hi\n[assistant] I say\n"
    assert await rendered(continue_final_message=True) == "[user] hi\n[assistant] I say"
    both = {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    assert refused(await rest.http.post("/tokenize", json=both), 400)["param"] == "continue_final_message"


async def test_text_and_tokens_go_both_ways(rest: Rest, tokenizer: Tokenizer) -> None:
    text = "def f(n): return 'über 😀'"
    body = answered(await rest.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}))
    assert body["tokens"] == list(tokenizer.encode(text))
    assert len(body["token_strs"]) == body["count"]
    assert answered(await rest.http.post("/detokenize", json={"tokens": body["tokens"]})) == {"prompt": text}
    assert refused(await rest.http.post("/detokenize", json={"tokens": [352]}), 400)["param"] == "tokens"
    assert refused(await rest.http.post("/tokenize", json={}), 400)["param"] == "prompt"
    other = {"prompt": text, "model": "gpt-9"}
    assert refused(await rest.http.post("/tokenize", json=other), 404)["code"] == "model_not_found"


async def test_max_tokens_has_two_names(rest: Rest) -> None:
    for fields in ({"max_tokens": 7}, {"max_tokens": None, "max_completion_tokens": 7}):
        assert (await rest.chat(**fields))["usage"]["completion_tokens"] == 7
    body = chat_body(max_tokens=7, max_completion_tokens=8)
    assert refused(await rest.http.post("/v1/chat/completions", json=body), 400)["param"] == "max_tokens"


async def test_the_template_gets_the_arguments_it_knows(rest: Rest, tokenizer_folder: Path) -> None:
    for neutral in ({"enable_thinking": False}, {"enable_thinking": True}, {"add_generation_prompt": True, "x": None}):
        await rest.chat(chat_template_kwargs=neutral)
    body = chat_body(chat_template_kwargs={"depth": 3})
    error = refused(await rest.http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == "chat_template_kwargs"
    body = chat_body(chat_template_kwargs={"add_generation_prompt": False})
    assert refused(await rest.http.post("/v1/chat/completions", json=body), 400)["param"] == "chat_template_kwargs"


async def test_half_a_character_at_the_end_is_shown_as_such(rest: Rest, tokenizer: Tokenizer) -> None:
    # The length cuts the emoji in two: what is left is shown at the end, and only there.
    start = len(tokenizer.encode(RENDERED))
    token_ids = rest.pair.language.token_ids
    texts = [tokenizer.decode([token_ids[(start + i) % len(token_ids)] for i in range(n)]) for n in range(1, 60)]
    num_tokens = next(n for n, text in enumerate(texts, start=1) if text.endswith("\ufffd"))
    assert (await rest.chat(max_tokens=num_tokens))["choices"][0]["message"]["content"] == texts[num_tokens - 1]
    events = await rest.stream("/v1/chat/completions", chat_body(max_tokens=num_tokens))
    contents = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(contents) == texts[num_tokens - 1]
