"""A user of pydantic-ai: `python pydantic_ai_client.py BASE_URL` prints one JSON object."""

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


async def run(base_url: str) -> dict[str, Any]:
    provider = OpenAIProvider(base_url=base_url, api_key="none")
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
        told[kind.__name__] = {"texts": [whole, streamed], "typed": answer.output.model_dump(), "after": after.output}
    return told


print(json.dumps(asyncio.run(run(sys.argv[1]))))
