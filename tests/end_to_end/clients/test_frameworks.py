"""Clients as their packages have them, each installed by itself: a streamed chat, a tool round trip, a typed answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from easyspec.cli.processes import FREE_PORT, ServiceStack, StackSettings
from tests.end_to_end.clients.environments import fetched
from tests.fakes.scripted_checkpoint import write_scripted_checkpoint
from tests.fakes.threads import in_thread

SCRIPTS = Path(__file__).parent / "scripts"
CITIES, DAYS = ("Paris", "Rome"), (1, 2, 3)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4000)]


def ran(folder: Path, package: str, *command: str, **environment: str) -> str:
    """What a command prints that finds `package` and what it needs in `folder`, and nothing of it elsewhere."""
    if not folder.exists() or not any(folder.iterdir()):
        fetched(sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", str(folder), package)
    surroundings = os.environ | {"PYTHONPATH": str(folder), "OPENAI_API_KEY": "none"} | environment
    ended = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=surroundings, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


def told(folder: Path, package: str, script: str, *base_urls: str) -> dict[str, Any]:
    lines = ran(folder, package, str(SCRIPTS / script), *base_urls).splitlines()
    results: dict[str, Any] = json.loads(lines[-1])
    return results


def check_typed(city: dict[str, Any]) -> None:
    assert city["city"] in CITIES
    assert city["days"] in DAYS


def test_anthropic(base_url: str, tmp_path: Path) -> None:
    results = told(tmp_path, "anthropic", "anthropic_client.py", base_url)
    whole, streamed = results["texts"]
    assert whole == streamed != ""
    check_typed(results["call"])
    check_typed(results["typed"])
    assert results["after"] in ("end_turn", "max_tokens")


def test_litellm(base_url: str, tmp_path: Path) -> None:
    results = told(tmp_path, "litellm", "litellm_client.py", base_url)
    streamed, whole = results["streamed"]
    assert whole == streamed != ""
    check_typed(results["call"])
    check_typed(results["typed"])
    assert results["responded"] in ("completed", "incomplete")


def test_instructor(base_url: str, tmp_path: Path) -> None:
    results = told(tmp_path, "instructor", "instructor_client.py", base_url)
    whole, streamed = results["texts"]
    assert whole == streamed != ""
    for city in (*results["typed"].values(), results["call"], results["after"]):
        check_typed(city)
    assert len(results["typed"]) == 4
    assert results["spoken"] in ("stop", "length")


def test_pydantic_ai(base_url: str, calling_url: str, tmp_path: Path) -> None:
    results = told(tmp_path / "packages", "pydantic-ai-slim[openai]", "pydantic_ai_client.py", base_url, calling_url)
    for api in ("OpenAIChatModel", "OpenAIResponsesModel"):
        whole, streamed = results[api]["texts"]
        assert whole == streamed != ""
        check_typed(results[api]["typed"])
        assert isinstance(results[api]["after"], str)
        assert results[api]["called"] == ["Paris", "Paris"]
        assert results[api]["spoken"] == ["".join(_SPEAKS)] * 2


def test_openai_agents(base_url: str, tmp_path: Path) -> None:
    results = told(tmp_path, "openai-agents", "agents_client.py", base_url)
    whole, streamed = results["texts"]
    assert whole == streamed != ""
    assert results["called"][0] in CITIES
    assert results["after"] == "sunny"
    check_typed(results["typed"])


def llm_home(folder: Path, base_url: str) -> Path:
    """Where the llm command finds its models: one, called easyspec."""
    folder.mkdir()
    model = f'- model_id: easyspec\n  model_name: base\n  api_base: "{base_url}"\n'
    model += "  supports_tools: true\n  supports_schema: true\n"
    (folder / "extra-openai-models.yaml").write_text(model)
    return folder


# Of a model that calls until there is a result, and then speaks of it.
_CALLS = ("<tool_call>\n", '{"name": "weather", "argu', 'ments": {"city": "Paris"}', "}\n</tool_call>")
_SPEAKS = ("It is ", "sunny in ", "Paris.")
_CALLING_TEMPLATE = (
    "{% if tools %}Calls: <tool_call>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}[{{ message.role }}] {{ message.content or '' }}\n{% endfor %}"
    "{% if messages[-1].role == 'tool' %}<speak>{% else %}<call>{% endif %}"
)


@pytest.fixture
def calling_url(tmp_path: Path) -> Iterator[str]:
    """A model that calls by itself: the llm command cannot force a call."""
    folder = write_scripted_checkpoint(tmp_path / "base", {"<call>": _CALLS, "<speak>": _SPEAKS}, ())
    (folder / "chat_template.jinja").write_text(_CALLING_TEMPLATE)
    settings = StackSettings(base=folder, draft=None, http_address=FREE_PORT)
    with in_thread(lambda: ServiceStack(settings, lambda role, line: None)) as stack:
        yield f"http://{stack.http_address}/v1"


def test_the_llm_command(base_url: str, calling_url: str, tmp_path: Path) -> None:
    home = llm_home(tmp_path / "home", base_url)
    question = ["-m", "llm", "-m", "easyspec", "-o", "temperature", "0", "-o", "max_tokens", "24", "Write `add(a, b)`."]
    streamed = ran(tmp_path / "packages", "llm", *question, LLM_USER_PATH=str(home))
    whole = ran(tmp_path / "packages", "llm", *question, "--no-stream", LLM_USER_PATH=str(home))
    assert streamed == whole
    assert "def add" in whole
    limited = ["-m", "llm", "-m", "easyspec", "-o", "temperature", "0", "-o", "max_tokens", "200"]
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": CITIES}, "days": {"type": "integer", "enum": DAYS}},
        "required": ["city", "days"],
    }
    typed = ran(tmp_path / "packages", "llm", *limited, "--schema", json.dumps(schema), "x", LLM_USER_PATH=str(home))
    check_typed(json.loads(typed))
    home = llm_home(tmp_path / "calling", calling_url)
    tools = ["--functions", "def weather(city: str) -> str:\n    return f'asked for {city}'"]
    said = ran(tmp_path / "packages", "llm", *limited, *tools, "Which weather?", LLM_USER_PATH=str(home))
    assert said.strip() == "".join(_SPEAKS)
    logged = ran(tmp_path / "packages", "llm", "-m", "llm", "logs", "--json", LLM_USER_PATH=str(home))
    assert "asked for Paris" in logged


_AI_SDK_SCRIPT = """
import { generateText, streamText, generateObject, tool, jsonSchema } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
const provider = createOpenAI({ baseURL: process.argv[2], apiKey: "none" });
const schema = jsonSchema(%(schema)s);
const results = {};
for (const [name, model] of [["chat", provider.chat("base")], ["responses", provider("base")]]) {
  const common = { model, temperature: 0, maxRetries: 0 };
  const prompt = "Write `add(a, b)`.";
  const whole = (await generateText({ ...common, prompt, maxOutputTokens: 24 })).text;
  let streamed = "";
  for await (const piece of streamText({ ...common, prompt, maxOutputTokens: 24 }).textStream) streamed += piece;
  const weather = tool({ description: "tells", inputSchema: schema, execute: async () => "sunny" });
  const called = await generateText({ ...common, prompt, tools: { weather }, toolChoice: "required" });
  const messages = [{ role: "user", content: prompt }, ...called.response.messages];
  const after = await generateText({ ...common, messages, tools: { weather }, maxOutputTokens: 24 });
  const typed = await generateObject({ ...common, prompt, schema });
  const first = await generateText({ ...common, prompt, maxOutputTokens: 8 });
  const turns = [{ role: "user", content: prompt }, ...first.response.messages, { role: "user", content: "And now?" }];
  const second = await generateText({ ...common, messages: turns, maxOutputTokens: 8 });
  results[name] = { texts: [whole, streamed], call: called.toolCalls[0].input, typed: typed.object,
    result: called.toolResults[0].output, after: after.finishReason, second: second.finishReason };
}
console.log(JSON.stringify(results));
"""


@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm here")
def test_the_ai_sdk(base_url: str, tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": CITIES, "type": "string"}, "days": {"enum": DAYS, "type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    script = tmp_path / "script.mjs"
    script.write_text(_AI_SDK_SCRIPT % {"schema": json.dumps(schema)})
    (tmp_path / "package.json").write_text('{"type": "module"}')
    fetched("npm", "install", "--no-audit", "--no-fund", "ai", "@ai-sdk/openai", "zod", folder=tmp_path)
    command = ["node", str(script), base_url]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for results in json.loads(ended.stdout).values():
        whole, streamed = results["texts"]
        assert whole == streamed != ""
        check_typed(results["call"])
        check_typed(results["typed"])
        assert results["result"] == "sunny"
        assert results["second"] in ("stop", "length")
        assert results["after"] in ("stop", "length", "tool-calls")
