"""A user of pydantic-ai: `python pydantic_ai_client.py BASE_URL CALLING_URL` prints one JSON object.

The model at CALLING_URL calls tools by itself, the other one only where it must.
"""

import asyncio
import json
import sys
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings


class City(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


CALLED: list[str] = []


def weather(city: str) -> str:
    """Tell the weather."""
    CALLED.append(city)
    return "sunny"


async def run(base_url: str, calling_url: str) -> dict[str, Any]:
    provider, calling = (OpenAIProvider(base_url=url, api_key="none") for url in (base_url, calling_url))
    settings = ModelSettings(temperature=0, max_tokens=200)
    told: dict[str, Any] = {}
    for kind in (OpenAIChatModel, OpenAIResponsesModel):
        model = kind("base", provider=provider)
        agent = Agent(model, model_settings=settings)
        whole = (await agent.run("Write `add(a, b)`.")).output
        async with agent.run_stream("Write `add(a, b)`.") as stream:
            streamed = await stream.get_output()
        answer = await Agent(model, output_type=City, model_settings=settings).run("weather?")
        # A typed answer is a call, which is told to be done: both go back with the next question.
        after = await agent.run("And now?", message_history=answer.all_messages())
        caller = Agent(kind("base", provider=calling), tools=[weather], model_settings=settings)
        spoken = (await caller.run("Which weather?")).output
        async with caller.run_stream("Which weather?") as stream:
            spoken_in_pieces = await stream.get_output()
        told[kind.__name__] = {
            "texts": [whole, streamed],
            "typed": answer.output.model_dump(),
            "after": after.output,
            "called": [*CALLED],
            "spoken": [spoken, spoken_in_pieces],
        }
        CALLED.clear()
    return told


print(json.dumps(asyncio.run(run(*sys.argv[1:]))))
