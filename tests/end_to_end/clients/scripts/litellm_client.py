"""A user of litellm: `python litellm_client.py BASE_URL` prints one JSON object."""

import json
import sys
from typing import Any, Literal

import litellm
from pydantic import BaseModel


class City(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def main(base_url: str) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": City.model_json_schema()}}]
    messages: list[Any] = [{"role": "user", "content": "Write `add(a, b)`."}]
    common: dict[str, Any] = {"model": "openai/base", "api_base": base_url, "api_key": "none", "max_tokens": 200}
    streamed = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in litellm.completion(messages=messages, stream=True, temperature=0, **common)
    )
    whole = litellm.completion(messages=messages, temperature=0, **common).choices[0].message.content
    called = litellm.completion(messages=messages, tools=tools, tool_choice="required", **common).choices[0].message
    call = called.tool_calls[0]
    messages += [called.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    after = litellm.completion(messages=messages, tools=tools, **common)
    typed = litellm.completion(messages=messages[:1], response_format=City, **common).choices[0].message.content
    responded = litellm.responses(
        input="Write `add(a, b)`.", **{**common, "max_output_tokens": common.pop("max_tokens")}
    )
    told = {
        "streamed": [streamed, whole],
        "call": json.loads(call.function.arguments),
        "after": after.choices[0].finish_reason,
        "typed": json.loads(typed),
        "responded": responded.status,
    }
    print(json.dumps(told))


main(sys.argv[1])
