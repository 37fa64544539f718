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
    common: dict[str, Any] = {
        "model": "base",
        "messages": messages,
        "max_tokens": 200,
        "temperature": 0,
        "max_retries": 0,
    }
    told: dict[str, Any] = {}
    with openai.OpenAI(base_url=base_url, api_key="none") as plain:
        for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
            client = instructor.from_openai(plain, mode=mode)
            told[mode.value] = client.chat.completions.create(response_model=City, **common).model_dump()
        client = instructor.from_openai(plain, mode=instructor.Mode.TOOLS)
        *_, last = client.chat.completions.create_partial(response_model=City, **common)
        told["partial"] = last.model_dump()
    print(json.dumps(told))


main(sys.argv[1])
