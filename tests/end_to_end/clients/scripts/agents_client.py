"""A user of openai-agents, with its default API: `python agents_client.py BASE_URL` prints one JSON object."""

import asyncio
import json
import sys
from typing import Any, Literal

import openai
from agents import Agent, ModelSettings, RunConfig, Runner, function_tool, set_tracing_disabled
from agents.models.openai_responses import OpenAIResponsesModel
from pydantic import BaseModel


class City(BaseModel):
    city: Literal["Paris", "Rome"]
    days: Literal[1, 2, 3]


CALLED: list[str] = []


@function_tool
def weather(city: Literal["Paris", "Rome"]) -> str:
    """Tell the weather."""
    CALLED.append(city)
    return "sunny"


async def run(base_url: str) -> dict[str, Any]:
    set_tracing_disabled(True)
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:
        model = OpenAIResponsesModel("base", client)
        config = RunConfig(model_settings=ModelSettings(temperature=0, max_tokens=200))
        speaker = Agent(name="speaker", model=model)
        streamed = Runner.run_streamed(speaker, "Write `add(a, b)`.", run_config=config)
        kinds = {event.type async for event in streamed.stream_events()}
        whole = await Runner.run(speaker, "Write `add(a, b)`.", run_config=config)
        caller = Agent(
            name="caller",
            model=model,
            tools=[weather],
            model_settings=ModelSettings(tool_choice="weather"),
            tool_use_behavior="stop_on_first_tool",
        )
        called = await Runner.run(caller, "weather?", run_config=config)
        typed = await Runner.run(Agent(name="typist", model=model, output_type=City), "weather?", run_config=config)
    return {
        "texts": [whole.final_output, streamed.final_output],
        "kinds": sorted(kinds),
        "called": CALLED,
        "after": called.final_output,
        "typed": typed.final_output.model_dump(),
    }


print(json.dumps(asyncio.run(run(sys.argv[1]))))
