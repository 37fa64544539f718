"""What a user of the official `openai` package does, whichever version: `python openai_script.py BASE_URL`.

Prints one JSON object. Uses nothing of ours, so that it also runs where only the package is installed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import openai

MESSAGES: Any = [{"role": "user", "content": "Write a Python function `add(a, b)`."}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "description": "tells", "parameters": CITY}}]


def run(base_url: str, speculation: str = "auto") -> dict[str, Any]:
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        common: dict[str, Any] = {
            "model": client.models.list().data[0].id,
            "seed": 7,
            "temperature": 0.8,
            "max_tokens": 24,
            "extra_body": {"speculation": {"mode": speculation}},
        }
        return {
            "max_model_len": client.models.retrieve(common["model"]).model_extra["max_model_len"],  # type: ignore[index]
            "completion": _completion(client, common),
            "chat": _chat(client, common),
            "tools": _tools(client, common),
            "json": _json(client, common),
            "error": _error(client, common),
        }


def _completion(client: openai.OpenAI, common: dict[str, Any]) -> dict[str, Any]:
    whole = client.completions.create(prompt="class Stack:", logprobs=2, n=2, **common)
    chunks = client.completions.create(
        prompt="class Stack:", stream=True, stream_options={"include_usage": True}, **common
    )
    streamed, usage = "", None
    for chunk in chunks:
        streamed += chunk.choices[0].text if chunk.choices else ""
        usage = chunk.usage
    assert usage is not None
    return {
        "texts": [choice.text for choice in whole.choices],
        "streamed": streamed,
        "completion_tokens": [whole.usage and whole.usage.completion_tokens, usage.completion_tokens],
        "logprobs": [choice.logprobs and choice.logprobs.token_logprobs for choice in whole.choices],
        "num_draft_tokens": whole.model_extra["metrics"]["speculative_decoding"]["num_draft_tokens"],  # type: ignore[index]
    }


def _chat(client: openai.OpenAI, common: dict[str, Any]) -> dict[str, Any]:
    whole = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, stop=["\n\n"], **common)
    streamed, role = "", None
    for chunk in client.chat.completions.create(messages=MESSAGES, stop=["\n\n"], stream=True, **common):
        delta = chunk.choices[0].delta
        role = role or delta.role
        streamed += delta.content or ""
    (choice,) = whole.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content or []
    return {
        "text": choice.message.content,
        "streamed": streamed,
        "role": role,
        "finish_reason": choice.finish_reason,
        "bytes": b"".join(bytes(entry.bytes or ()) for entry in content).decode(),
        "logprobs": [[entry.logprob, *(top.logprob for top in entry.top_logprobs)] for entry in content],
    }


def _tools(client: openai.OpenAI, common: dict[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, **common, "max_tokens": 100}
    named: Any = {"type": "function", "function": {"name": "weather"}}
    required = client.chat.completions.create(tool_choice="required", parallel_tool_calls=False, **asked)
    arguments, name, reason = "", None, None
    for chunk in client.chat.completions.create(tool_choice=named, stream=True, **asked):
        for piece in chunk.choices[0].delta.tool_calls or []:
            assert piece.function is not None
            name = name or piece.function.name
            arguments += piece.function.arguments or ""
        reason = chunk.choices[0].finish_reason or reason
    (message,) = [choice.message for choice in required.choices]
    assert message.tool_calls
    history: Any = [*MESSAGES, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}]
    after = client.chat.completions.create(**(asked | {"messages": history, "max_tokens": 4}))
    return {
        "required": message.tool_calls[0].function.arguments,  # type: ignore[union-attr]
        "streamed": [name, arguments, reason],
        "after": after.choices[0].finish_reason,
    }


def _json(client: openai.OpenAI, common: dict[str, Any]) -> str | None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    asked = {**common, "max_tokens": 100}
    return client.chat.completions.create(messages=MESSAGES, response_format=form, **asked).choices[0].message.content


def _error(client: openai.OpenAI, common: dict[str, Any]) -> list[Any]:
    told: list[Any] = []
    for fields in ({"model": "gpt-9"}, {"top_p": 7.0}, {"extra_body": {"bar": 1}}):
        try:
            client.chat.completions.create(messages=MESSAGES, **(common | fields))
        except openai.APIStatusError as error:
            told.append([type(error).__name__, error.status_code, error.code, error.param, bool(error.request_id)])  # type: ignore[attr-defined]
    return told


if __name__ == "__main__":
    print(json.dumps({"version": openai.__version__, **run(sys.argv[1])}))
