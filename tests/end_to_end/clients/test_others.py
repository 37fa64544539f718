"""Other clients against the bundled pair: langchain-openai, curl, and npm's `openai`."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.end_to_end.clients.environments import fetched
from tests.end_to_end.clients.openai_script import CITY

QUESTION = "Write a Python function `add(a, b)`."


@pytest.mark.slow
def test_langchain(base_url: str) -> None:
    from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    options: dict[str, Any] = {"base_url": base_url, "api_key": "none", "model": "base", "seed": 7}
    chat = ChatOpenAI(**options, temperature=0.8, max_completion_tokens=100)
    whole = chat.invoke(QUESTION)
    streamed = AIMessageChunk(content="")
    for chunk in chat.stream(QUESTION, stream_usage=True):
        assert isinstance(chunk, AIMessageChunk)
        streamed += chunk
    assert streamed.content == whole.content != ""
    assert streamed.usage_metadata is not None
    assert whole.usage_metadata is not None
    for name in ("input_tokens", "output_tokens", "total_tokens"):  # how many were cached, others before may change
        assert streamed.usage_metadata[name] == whole.usage_metadata[name]  # type: ignore[literal-required]
    tool = {"type": "function", "function": {"name": "weather", "description": "tells", "parameters": CITY}}
    called = chat.bind_tools([tool], tool_choice="weather").invoke(QUESTION)
    assert isinstance(called, AIMessage)
    (call,) = called.tool_calls
    assert call["name"] == "weather"
    jsonschema.validate(call["args"], CITY)
    answered = chat.bind_tools([tool]).invoke(
        [HumanMessage(QUESTION), called, ToolMessage("sunny", tool_call_id=call["id"])]
    )
    assert isinstance(answered, AIMessage)
    structured = chat.with_structured_output({"title": "City", **CITY}, method="json_schema").invoke(QUESTION)
    jsonschema.validate(structured, CITY)
    chat.root_client.close()


def curl(*arguments: str) -> str:
    command = ["curl", "--silent", "--show-error", "--max-time", "60", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=70).stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(base_url: str) -> None:
    json_header = ("-H", "content-type: application/json")
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20, "seed": 1})
    whole = json.loads(curl(f"{base_url}/chat/completions", *json_header, "-d", body))
    streaming = body[:-1] + ', "stream": true}'
    text = curl("--no-buffer", "--include", f"{base_url}/chat/completions", *json_header, "-d", streaming)
    head, _, events = text.partition("\n\n")
    assert head.startswith("HTTP/1.1 200")
    assert "content-type: text/event-stream" in head
    *chunks, done, end = events.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    deltas = [json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    refused = curl("--include", f"{base_url}/completions", *json_header, "-d", "{}", "-H", "x-request-id: mine")
    assert refused.startswith("HTTP/1.1 400")
    assert "x-request-id: mine" in refused
    assert json.loads(refused.partition("\n\n")[2])["error"]["param"] == "prompt"
    assert json.loads(curl(base_url.removesuffix("/v1") + "/health"))["status"] == "ok"


_NODE_SCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const common = { model, seed: 7, temperature: 0.8, max_tokens: 24 };
const messages = [{ role: "user", content: %(question)s }];
const schema = %(schema)s;
const tools = [{ type: "function", function: { name: "weather", description: "tells", parameters: schema } }];
const tool_choice = { type: "function", function: { name: "weather" } };
const completion = await client.completions.create({ prompt: "class Stack:", logprobs: 1, ...common });
const chat = await client.chat.completions.create({ messages, logprobs: true, ...common });
let streamed = "", usage = null;
const stream = await client.chat.completions.create(
  { messages, stream: true, stream_options: { include_usage: true }, ...common });
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const longer = { ...common, max_tokens: 100 };
const called = await client.chat.completions.create({ messages, tools, tool_choice, ...longer });
const response_format = { type: "json_schema", json_schema: { name: "city", schema, strict: true } };
const form = await client.chat.completions.create({ messages, response_format, ...longer });
const runner = client.chat.completions.runTools({ messages, tool_choice, ...longer, tools: [{ type: "function",
  function: { name: "weather", description: "tells", parameters: schema, parse: JSON.parse,
    function: () => "sunny" } }] });
const ran = await runner.finalFunctionToolCallResult();
const history = [...messages, called.choices[0].message,
  { role: "tool", tool_call_id: called.choices[0].message.tool_calls[0].id, content: "sunny" }];
const after = await client.chat.completions.create({ messages: history, tools, ...common });
const parsed = await client.chat.completions.parse({ messages, response_format, ...longer });
const asked = { model, input: messages, temperature: 0, max_output_tokens: 24 };
const response = await client.responses.create(asked);
let responded = "";
for await (const event of await client.responses.create({ ...asked, stream: true }))
  if (event.type === "response.output_text.delta") responded += event.delta;
let error = null;
try {
  await client.chat.completions.create({ messages, ...common, top_p: 7 });
} catch (caught) {
  error = [caught.constructor.name, caught.status, caught.code, caught.param];
}
console.log(JSON.stringify({
  completion: completion.choices[0].text,
  numLogprobs: completion.choices[0].logprobs.token_logprobs.length,
  chat: chat.choices[0].message.content,
  streamed,
  usage: [usage, chat.usage],
  call: called.choices[0].message.tool_calls[0].function,
  json: form.choices[0].message.content,
  ran,
  after: after.choices[0].finish_reason,
  parsed: parsed.choices[0].message.parsed,
  responses: [response.output_text, responded],
  error,
}));
"""


@pytest.mark.slow
@pytest.mark.timeout(4000)
@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm here")
def test_npms_openai(base_url: str, tmp_path: Path) -> None:
    script = tmp_path / "script.mjs"
    script.write_text(_NODE_SCRIPT % {"question": json.dumps(QUESTION), "schema": json.dumps(CITY)})
    (tmp_path / "package.json").write_text('{"type": "module"}')
    fetched("npm", "install", "--no-audit", "--no-fund", "openai", folder=tmp_path)
    command = ["node", str(script), base_url]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout)
    assert results["completion"]
    assert results["numLogprobs"] == 24
    assert results["streamed"] == results["chat"]
    for usage in results["usage"]:
        del usage["prompt_tokens_details"]  # how many were cached
    assert results["usage"][0] == results["usage"][1]
    assert results["call"]["name"] == "weather"
    jsonschema.validate(json.loads(results["call"]["arguments"]), CITY)
    jsonschema.validate(json.loads(results["json"]), CITY)
    jsonschema.validate(results["parsed"], CITY)
    assert results["ran"] == "sunny"
    assert results["after"] in ("stop", "length", "tool_calls")
    assert results["responses"][0] == results["responses"][1] != ""
    assert results["error"] == ["BadRequestError", 400, "invalid_value", "top_p"]
