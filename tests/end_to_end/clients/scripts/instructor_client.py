"""A user of instructor: `python instructor_client.py BASE_URL` prints one JSON object."""

import json
import sys
from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel


class City(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


def main(base_url: str) -> None:
    messages: Any = [{"role": "user", "content": "Write `add(a, b)`."}]
    common: dict[str, Any] = {"model": "base", "max_tokens": 200, "temperature": 0}
    typed: dict[str, Any] = {}
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as plain:
        for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
            client = instructor.from_openai(plain, mode=mode)
            asked = {"response_model": City, "messages": messages, "max_retries": 0, **common}
            typed[mode.value] = client.chat.completions.create(**asked).model_dump()
        client = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
        *_, last = client.chat.completions.create_partial(**asked)
        typed["partial"] = last.model_dump()
        # Its client without a type is the one below it.
        whole = client.chat.completions.create(response_model=None, messages=messages, **common)
        chunks = client.chat.completions.create(response_model=None, messages=messages, stream=True, **common)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        # Its typed answers are calls: the one it made goes back with a result, and a typed answer follows.
        city, completion = client.chat.completions.create_with_completion(**asked)
        called = completion.choices[0].message
        result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "sunny"}
        history = [*messages, called.model_dump(), result]
        after = client.chat.completions.create(**asked | {"messages": history})
        spoken = client.chat.completions.create(response_model=None, messages=history, **common)
    told = {
        "texts": [whole.choices[0].message.content, streamed],
        "typed": typed,
        "call": city.model_dump(),
        "after": after.model_dump(),
        "spoken": spoken.choices[0].finish_reason,
    }
    print(json.dumps(told))


main(sys.argv[1])
