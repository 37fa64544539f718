"""The official `openai` package against the bundled pair: the installed version, and the one before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel

from tests.end_to_end.clients import openai_script
from tests.end_to_end.clients.environments import fetched
from tests.end_to_end.clients.openai_script import CITY, MESSAGES


@pytest.fixture(scope="module")
def results(base_url: str) -> dict[str, Any]:
    return openai_script.run(base_url)


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none") as client:
        yield client


def check(results: dict[str, Any]) -> None:
    """What must be true of the script's results, whichever client ran it."""
    assert results["max_model_len"] > 0
    completion, chat, tools = results["completion"], results["chat"], results["tools"]
    assert completion["streamed"] == completion["texts"][0] != completion["texts"][1]
    assert completion["completion_tokens"] == [48, 24]
    assert [len(logprobs) for logprobs in completion["logprobs"]] == [24, 24]
    assert chat["streamed"] == chat["text"]
    assert chat["role"] == "assistant"
    assert chat["bytes"].startswith(chat["text"])
    assert "\n\n" not in chat["text"]
    for arguments in (tools["required"], tools["streamed"][1], results["json"]):
        jsonschema.validate(json.loads(arguments), CITY)
    assert (tools["streamed"][0], tools["streamed"][2]) == ("weather", "tool_calls")
    assert results["error"] == [
        ["NotFoundError", 404, "model_not_found", "model", True],
        ["BadRequestError", 400, "invalid_value", "top_p", True],
        ["BadRequestError", 400, "unknown_parameter", "bar", True],
    ]


def test_the_installed_version(results: dict[str, Any]) -> None:
    assert openai.__version__.startswith("3.")
    check(results)
    assert results["completion"]["num_draft_tokens"] > 0


def test_everything_is_the_same_without_speculation(base_url: str, results: dict[str, Any]) -> None:
    """Texts, logprobs, structured output and tool calls, byte for byte."""
    plain = openai_script.run(base_url, speculation="off")
    assert plain["completion"]["num_draft_tokens"] == 0
    assert said(plain) == said(results)


def said(results: dict[str, Any]) -> dict[str, Any]:
    """The results without what depends on how busy the machine was."""
    return {
        **results,
        "completion": {name: value for name, value in results["completion"].items() if name != "num_draft_tokens"},
    }


def test_a_regex_by_extension(client: openai.OpenAI) -> None:
    regex = r"[a-f]{3}-[0-9]{2}"
    for body in ({"guided_regex": regex}, {"structured_outputs": {"regex": regex}}):
        reply = client.completions.create(model="base", prompt="x = ", max_tokens=30, seed=3, extra_body=body)
        (choice,) = reply.choices
        jsonschema.validate(choice.text, {"type": "string", "pattern": f"^({regex})$"})
        assert choice.finish_reason == "stop"


def test_a_choice_by_extension(client: openai.OpenAI) -> None:
    texts = ["C++ (all of it)", "a|b", "x.y$"]
    reply = client.completions.create(model="base", prompt="x = ", n=4, seed=3, extra_body={"guided_choice": texts})
    assert {choice.text for choice in reply.choices} <= set(texts)


class City(BaseModel):
    """A city."""

    city: Literal["Paris", "Rome"]


def test_helpers_that_parse(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "base", "messages": MESSAGES, "max_tokens": 100, "seed": 1}
    with client.chat.completions.stream(response_format=City, **common) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, City)
    tool = openai.pydantic_function_tool(City, name="weather")
    parsed = client.chat.completions.parse(tools=[tool], tool_choice="required", parallel_tool_calls=False, **common)
    (call,) = parsed.choices[0].message.tool_calls or []
    assert parsed.choices[0].finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, City)


def test_responses(client: openai.OpenAI) -> None:
    """What this client's users are told to use now: streams, a tool round trip, a typed answer."""
    common: dict[str, Any] = {"model": "base", "temperature": 0}
    question = "Write a Python function `add(a, b)`."
    whole = client.responses.create(input=question, max_output_tokens=24, **common)
    events = list(client.responses.create(input=question, max_output_tokens=24, stream=True, **common))
    streamed = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert streamed == whole.output_text != ""
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    tool: Any = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
    history: Any = [{"role": "user", "content": question}]
    asked: dict[str, Any] = {"tools": [tool], "max_output_tokens": 100, **common}
    called = client.responses.create(input=history, tool_choice="required", parallel_tool_calls=False, **asked)
    (call,) = called.output
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), CITY)
    history += [*called.output, {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    after = client.responses.create(input=history, **asked)
    assert after.status in ("completed", "incomplete")
    parsed = client.responses.parse(input=question, text_format=City, max_output_tokens=100, **common)
    assert isinstance(parsed.output_parsed, City)
    with client.responses.stream(input=question, text_format=City, max_output_tokens=100, **common) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.output_text.delta", "response.output_item.done", "response.completed"} <= kinds
    assert final.output_parsed == parsed.output_parsed
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(input="go on", previous_response_id=whole.id, **common)
    assert refused.value.param == "previous_response_id"


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_the_version_before(base_url: str, results: dict[str, Any], tmp_path: Path) -> None:
    fetched(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(tmp_path), "openai>=2,<3")
    script = Path(openai_script.__file__)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(script), base_url]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    older = json.loads(ended.stdout)
    assert older.pop("version").startswith("2.")
    check(older)
    assert said(older) == said(results)
