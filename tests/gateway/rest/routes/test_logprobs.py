"""Log-probabilities in both shapes, in step with the text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.text.tokenizer import Tokenizer
from tests.gateway.rest.conftest import PROMPT, Rest, chat_body, completion_body, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_chat_has_an_object_a_token_with_its_bytes(rest: Rest, tokenizer: Tokenizer) -> None:
    (choice,) = (await rest.chat(logprobs=True, top_logprobs=2))["choices"]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"]
    assert len(content) == 60
    for entry in content:
        assert entry["logprob"] == -0.5
        assert [one["logprob"] for one in entry["top_logprobs"]] == [-0.5, -1.5]
        assert {key: entry[key] for key in ("token", "bytes", "logprob")} == entry["top_logprobs"][0]
    halves = [entry for entry in content if entry["token"].startswith("bytes:")]
    assert halves  # an emoji takes several tokens here
    assert halves[0]["token"] == "bytes:" + "".join(f"\\x{byte:02x}" for byte in halves[0]["bytes"])


async def test_without_top_the_list_is_empty(rest: Rest) -> None:
    (choice,) = (await rest.chat(logprobs=True))["choices"]
    assert all(entry["top_logprobs"] == [] for entry in choice["logprobs"]["content"])
    assert (await rest.chat(logprobs=False))["choices"][0]["logprobs"] is None


async def test_completions_have_parallel_lists(rest: Rest) -> None:
    (choice,) = (await rest.completion(logprobs=2))["choices"]
    logprobs = choice["logprobs"]
    assert list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert {len(values) for values in logprobs.values()} == {60}
    assert logprobs["token_logprobs"] == [-0.5] * 60
    for token, offset, top in zip(logprobs["tokens"], logprobs["text_offset"], logprobs["top_logprobs"], strict=True):
        assert top[token] == -0.5
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)


async def test_an_echoed_prompts_first_token_has_none(rest: Rest, tokenizer: Tokenizer) -> None:
    (choice,) = (await rest.completion(logprobs=0, echo=True, max_tokens=4))["choices"]
    logprobs = choice["logprobs"]
    num_prompt = len(tokenizer.encode(PROMPT))
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (num_prompt + 3)
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {logprobs["tokens"][1]: -0.5}
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"][num_prompt] == len(PROMPT)


@pytest.mark.parametrize("fields", [{}, {"stop": ["STOP"]}, {"stop": ["ST", "here"], "max_tokens": 9}])
@pytest.mark.parametrize("offset", range(5))
async def test_streamed_entries_follow_the_text_and_nothing_of_a_stop_leaks(
    rest: Rest, offset: int, fields: dict[str, Any]
) -> None:
    rest.pair.drafter.wrong_every = 10_000
    prompt = [5] * (7 + offset)  # moves the stop to another place in the block
    bodies = [
        await rest.completion(prompt=prompt, logprobs=1, speculation={"mode": mode}, **fields) for mode in ("off", "on")
    ]
    assert bodies[0]["choices"] == bodies[1]["choices"]
    (choice,) = bodies[0]["choices"]
    events = await rest.stream("/v1/completions", completion_body(prompt=prompt, logprobs=1, **fields))
    streamed: dict[str, list[Any]] = {name: [] for name in choice["logprobs"]}
    text = ""
    for event in events:
        (part,) = event["choices"]
        text += part["text"]
        if part["logprobs"] is not None:
            for name, values in part["logprobs"].items():
                streamed[name] += values
            if fields:
                assert all(offset <= len(text) for offset in part["logprobs"]["text_offset"])
    assert (text, streamed) == (choice["text"], choice["logprobs"])
    assert "".join(choice["logprobs"]["tokens"]).startswith(text) or "bytes:" in "".join(streamed["tokens"])
    if choice["finish_reason"] == "stop":
        assert all(offset < len(text) for offset in streamed["text_offset"])


async def test_the_end_token_is_no_part_of_the_text(rest: Rest) -> None:
    token_ids = rest.pair.language.token_ids
    start = len((await rest.chat(logprobs=True))["choices"][0]["logprobs"]["content"])
    assert start == 60
    end = token_ids[(7 + 5) % len(token_ids)]
    (choice,) = (await rest.completion(prompt=[5] * 7, logprobs=0, stop_token_ids=[end]))["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == 5
    (whole,) = (
        await rest.completion(prompt=[5] * 7, logprobs=0, stop_token_ids=[end], include_stop_str_in_output=True)
    )["choices"]
    assert len(whole["logprobs"]["tokens"]) == 6
    assert whole["text"].startswith(choice["text"].rstrip("\ufffd"))
    assert len(whole["text"]) > whole["logprobs"]["text_offset"][-1]


@pytest.mark.parametrize("includes_stop", [False, True])
async def test_after_an_echo_the_end_token_has_an_entry_but_no_text(rest: Rest, includes_stop: bool) -> None:
    """lm-evaluation-harness asks for one token after the prompt, and reads prompt + 1 entries."""
    verifier = rest.pair.verifier
    verifier.language = replace(verifier.language, token_ids=(verifier.language.eos_token_id,))
    fields: dict[str, Any] = {"prompt": [5, 6, 7], "echo": True, "max_tokens": 1, "logprobs": 1}
    fields["include_stop_str_in_output"] = includes_stop
    (choice,) = (await rest.completion(**fields))["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"][-1] == len(choice["text"])
    assert "".join(choice["logprobs"]["tokens"][:3]) == choice["text"]
    events = await rest.stream("/v1/completions", completion_body(**fields))
    streamed = [one for event in events for one in (event["choices"][0]["logprobs"] or {}).get("token_logprobs", [])]
    assert streamed == choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("fields", [{"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}])
async def test_too_many_or_unasked_for_are_refused(rest: Rest, fields: dict[str, Any]) -> None:
    error = refused(await rest.http.post("/v1/chat/completions", json=chat_body(**fields)), 400)
    assert error["param"] == "top_logprobs"


@pytest.mark.parametrize("num_top", [0, 1, 2])
async def test_a_prompts_log_probabilities_are_told_by_token_id(rest: Rest, tokenizer: Tokenizer, num_top: int) -> None:
    """In vLLM's shape, whatever is asked about the output, and without an echo."""
    token_ids = tokenizer.encode(PROMPT)
    for logprobs in (None, 1):
        reply = await rest.completion(prompt_logprobs=num_top, logprobs=logprobs, n=2, max_tokens=4)
        for choice in reply["choices"]:
            first, *others = choice["prompt_logprobs"]
            assert first is None
            assert len(others) == len(token_ids) - 1
            for token_id, told in zip(token_ids[1:], others, strict=True):
                assert told[str(token_id)]["logprob"] == -0.5
                assert told[str(token_id)]["decoded_token"] == tokenizer.token_text(token_id)
                assert [one["rank"] for one in told.values()] == ([*range(1, num_top + 1)] or [None])
            assert not choice["text"].startswith(PROMPT)
            assert (choice["logprobs"] is None) == (logprobs is None)
            if logprobs is not None:
                assert {len(top) for top in choice["logprobs"]["top_logprobs"]} == {1}
        assert reply["usage"]["completion_tokens"] == 8
    chat = await rest.chat(prompt_logprobs=num_top, n=2)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert chat["choices"][0]["message"]["content"] == (await rest.chat())["choices"][0]["message"]["content"]


@pytest.mark.parametrize("body", [chat_body, completion_body])
async def test_a_stream_has_no_prompt_to_tell_about(rest: Rest, body: Any) -> None:
    path = "/v1/chat/completions" if body is chat_body else "/v1/completions"
    for fields in ({"prompt_logprobs": 1, "stream": True}, {"prompt_logprobs": 21}, {"prompt_logprobs": -1}):
        error = refused(await rest.http.post(path, json=body(**fields)), 400)
        assert error["param"] == "prompt_logprobs"


async def test_a_prompt_of_one_token_has_one_entry(rest: Rest) -> None:
    told = await rest.completion(prompt=[5], prompt_logprobs=1, max_tokens=2)
    assert told["choices"][0]["prompt_logprobs"] == [None]
    for max_tokens in (0, 2):
        echoed = await rest.completion(prompt=[5], echo=True, logprobs=1, max_tokens=max_tokens)
        logprobs = echoed["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"][0] is None
        assert len(logprobs["tokens"]) == max_tokens + 1
