"""A user of the official `anthropic` package: `python anthropic_client.py BASE_URL` prints one JSON object."""

import json
import sys
from typing import Any, Literal

import anthropic
from pydantic import BaseModel


class City(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def main(base_url: str) -> None:
    messages: Any = [{"role": "user", "content": "Write `add(a, b)`."}]
    tools: Any = [{"name": "weather", "description": "tells", "input_schema": City.model_json_schema()}]
    common: dict[str, Any] = {"model": "base", "max_tokens": 200, "extra_body": {"temperature": 0}}
    with anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key="none") as client:
        whole = client.messages.create(messages=messages, **common)
        with client.messages.stream(messages=messages, **common) as stream:
            streamed = "".join(stream.text_stream)
        called = client.messages.create(messages=messages, tools=tools, tool_choice={"type": "any"}, **common)
        call = next(block for block in called.content if block.type == "tool_use")
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
        history = [*messages, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
        after = client.messages.create(messages=history, tools=tools, **common)
        typed = client.messages.parse(messages=messages, output_format=City, **common).parsed_output
    assert typed is not None
    told = {
        "texts": [whole.content[0].text, streamed],
        "call": call.input,
        "after": after.stop_reason,
        "typed": typed.model_dump(),
    }
    print(json.dumps(told))


main(sys.argv[1])
