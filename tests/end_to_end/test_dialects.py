"""Chat templates of many families over REST and real engines: what is thought, said and called, however it is drafted.

One checkpoint says all scripts; each family has a gateway with its template (`--chat-template`). Script pieces are cut
where few vocabularies would, so that marks begin and end within tokens, and within accepted blocks.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import jsonschema
import pytest
import pytest_asyncio

from drafter_service.config import DrafterSettings
from drafter_service.engine import DrafterEngine
from drafter_service.server import DrafterServer
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from tests.conftest import NUM_KV_SLOTS
from tests.fakes.scripted_checkpoint import write_scripted_checkpoint
from tests.fakes.servers import serving
from tests.fakes.services import running
from tests.gateway.rest.conftest import answered, events_of, refused
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine
from verifier_service.server import VerifierServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "tells", "parameters": CITY}},
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
]
PARIS = {"city": "Paris", "days": 3}
FORM = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
# Plainly, by chains of several lengths, and by trees.
SPECULATION: list[dict[str, Any]] = [
    {"mode": "off"},
    *({"mode": "on", "max_levels": levels, "width": 1, "max_nodes": levels} for levels in (1, 3)),
    {"mode": "on", "max_levels": 5, "width": 3, "max_nodes": 20},
]

_MESSAGES = (
    "{% if tools %}[tools] {{ tools | tojson }} Calls: HOW\n{% endif %}"
    "{% for message in messages %}[{{ message.role }}] {{ message.content or '' }}"
    "{% if message.reasoning_content %}<thought>{{ message.reasoning_content }}</thought>{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "CALL{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}\n{% endfor %}"
)
_ANSWER = "{% if add_generation_prompt %}[assistant] CUE{% endif %}"


@dataclass(frozen=True)
class Family:
    """A template, and what its model says: it thinks `thought`, if anything, and calls both functions."""

    how: str  # what the template says of calls
    script: tuple[str, ...]
    thought: str = ""
    spoken: str = ""
    opening: str = ""  # of the thinking, if the template writes that

    @property
    def cue(self) -> str:
        """What a prompt ends with."""
        return self.opening or f"<to say: {self.script[0]}>"

    @property
    def template(self) -> str:
        return _MESSAGES.replace("HOW", self.how) + _ANSWER.replace("CUE", self.cue)


FAMILIES = {
    "qwen3": Family(
        "<tool_call>{...}</tool_call>, after <think>...</think>",
        (
            *("<think>", "\nHm ", 'hm {"', 'city": 1', "}.\n", "</think>", '\n\n<tool_call>\n{"name": "wea'),
            *('ther", "arguments": {"city": "Pa', 'ris", "days": 3}}\n</too', 'l_call>\n<tool_call>\n{"name": "time"'),
            *(', "arguments": {}', "}\n", "</tool_call>"),
        ),
        thought='Hm hm {"city": 1}.',
    ),
    "qwen3, opened": Family(
        "<tool_call>{...}</tool_call>, after <think>...</think>",
        (
            *("Let ", "me <tool_call> see.", "\n</th", "ink>\n\n", 'So.\n<tool_call>{"name": "weather", "argu'),
            *('ments": {"city": "Paris", "days": 3}}</tool_call>', '<tool_call>{"name": "time", "arguments": {}}</t'),
            "ool_call>\n",
        ),
        thought="Let me <tool_call> see.",
        spoken="So.",
        opening="<think>\n",
    ),
    "qwen3-coder": Family(
        "<tool_call><function=name><parameter=p>v</parameter></function></tool_call>",
        (
            *("I look.", "\n\n<tool", "_call>\n<func", "tion=weather>\n<para", "meter=city>\nParis\n", "</parameter>"),
            *("\n<parameter=da", "ys>\n3\n</parameter>\n</function>\n</tool_cal", "l>\n<tool_call>\n<function=time>"),
            *("\n</fun", "ction>\n</tool_call>\n"),
        ),
        spoken="I look.",
    ),
    "llama pythonic": Family(
        "[func_name1(params_name1=params_value1)]",
        ("<|python_start|>", "[wea", "ther(city='Par", "is', days=", "3), ti", "me()]", "<|python_end|>"),
    ),
    "mistral v3": Family(
        "[TOOL_CALLS] [{...}]",
        (
            *(
                "[TOOL",
                '_CALLS] [{"name": "weather", "argum',
                'ents": {"city": "Paris", "da',
                'ys": 3}}, {"name": "time"',
            ),
            *(', "arguments": {', "}}", "]"),
        ),
    ),
    "mistral, thinking": Family(
        "[TOOL_CALLS]name[ARGS]{...}, after [THINK]...[/THINK]",
        (
            *("[THINK]", "I ", "think.\n", "[/THINK]", "[TOOL_CALLS]", "weather", "[ARGS]", '{"city": "Paris", "d'),
            *('ays": 3}', "[TOOL_C", "ALLS]time[AR", "GS]{}"),
        ),
        thought="I think.",
    ),
    "gpt-oss": Family(
        "<|channel|>commentary to=functions.name <|constrain|>json<|message|>{...}<|call|>",
        (
            *("<|channel|>", "ana", "lysis", "<|message|>", "Well", ", so.", "<|end|>", "<|start|>", "assistant<|chan"),
            *(
                "nel|>commentary to=functions.wea",
                "ther ",
                "<|constrain|>",
                'json<|message|>{"city": "Par',
                'is", "days": 3}',
            ),
            *(
                "<|call|>",
                "<|start|>assis",
                "tant<|channel|>commentary to=functions.time json<|message|>{}<|ca",
                "ll|>",
            ),
        ),
        thought="Well, so.",
    ),
}
SPECIAL = (
    *("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "<|python_start|>", "<|python_end|>"),
    *("<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|channel|>", "<|message|>", "<|constrain|>"),
)


@dataclass(frozen=True)
class Reply:
    """What a client sees of an answer, and nothing that differs between two answers of the same bytes."""

    thought: str
    spoken: str
    calls: tuple[tuple[str, str], ...]
    finish_reason: str
    num_tokens: int
    num_thinking_tokens: int
    logprobs: tuple[tuple[str, float], ...]

    @property
    def called(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


@dataclass(frozen=True)
class Asked:
    """One family's gateway."""

    http: httpx.AsyncClient

    async def reply(self, **fields: Any) -> Reply:
        """The reply, which is the same whole and streamed, and with every kind of speculation."""
        body = {"messages": [{"role": "user", "content": "Which weather?"}], "max_tokens": 200, "temperature": 0}
        body |= {"logprobs": True} | fields
        replies = []
        for speculation in SPECULATION:
            asked = body | {"speculation": speculation}
            replies.append(_whole(answered(await self.http.post("/v1/chat/completions", json=asked))))
            streamed = await self.http.post(
                "/v1/chat/completions", json=asked | {"stream": True, "stream_options": {"include_usage": True}}
            )
            assert streamed.status_code == 200, streamed.text
            replies.append(_streamed(events_of(streamed.text)))
        for reply in replies[1:]:
            assert reply == replies[0]
        return replies[0]


def _whole(body: dict[str, Any]) -> Reply:
    (choice,) = body["choices"]
    message, usage = choice["message"], body["usage"]
    return Reply(
        message.get("reasoning_content") or "",
        message["content"] or "",
        tuple((call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()),
        choice["finish_reason"],
        usage["completion_tokens"],
        usage["completion_tokens_details"]["reasoning_tokens"],
        _logprobs(choice),
    )


def _streamed(events: list[dict[str, Any]]) -> Reply:
    *events, last = events
    choices = [event["choices"][0] for event in events]
    thought = "".join(choice["delta"].get("reasoning_content") or "" for choice in choices)
    spoken = "".join(choice["delta"].get("content") or "" for choice in choices)
    calls: dict[int, tuple[str, str]] = {}
    for call in (call for choice in choices for call in choice["delta"].get("tool_calls") or ()):
        name, arguments = calls.get(call["index"], ("", ""))
        assert ("id" in call) == (call["index"] not in calls)
        calls[call["index"]] = name + (call["function"].get("name") or ""), arguments + call["function"]["arguments"]
    usage = last["usage"]
    return Reply(
        thought,
        spoken,
        tuple(calls.values()),
        choices[-1]["finish_reason"],
        usage["completion_tokens"],
        usage["completion_tokens_details"]["reasoning_tokens"],
        tuple(entry for choice in choices for entry in _logprobs(choice)),
    )


def _logprobs(choice: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    entries = (choice.get("logprobs") or {}).get("content") or ()
    return tuple((entry["token"], entry["logprob"]) for entry in entries)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def families(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Asked]]:
    folder = tmp_path_factory.mktemp("scripted")
    write_scripted_checkpoint(folder, {family.cue: family.script for family in FAMILIES.values()}, SPECIAL)
    engine: dict[str, Any] = {"model": str(folder), "num_threads": 1, "num_kv_slots": NUM_KV_SLOTS}
    verifier = VerifierServer(VerifierEngine(VerifierSettings(**engine)))
    drafter = DrafterServer(DrafterEngine(DrafterSettings(**engine, ask="always")))
    async with AsyncExitStack() as stack:
        addresses: dict[str, Any] = {
            "verifier_address": await stack.enter_async_context(serving(verifier)),
            "drafter_address": await stack.enter_async_context(serving(drafter)),
        }
        asked = {}
        for index, (name, family) in enumerate(FAMILIES.items()):
            template = folder / f"{index}.jinja"
            template.write_text(family.template)
            settings = GatewaySettings(
                address="127.0.0.1:0",
                http_address="127.0.0.1:0",
                tokenizer=folder,
                chat_template=template,
                draft_deadline_ms=20_000,
                **addresses,
            )
            gateway = GatewayServer(settings)
            await stack.enter_async_context(running(gateway))
            base_url = f"http://127.0.0.1:{gateway.http_port}"
            http = httpx.AsyncClient(base_url=base_url, timeout=60, trust_env=False)
            asked[name] = Asked(await stack.enter_async_context(http))
        yield asked


@pytest.mark.parametrize("name", FAMILIES)
async def test_what_is_thought_said_and_called(families: dict[str, Asked], name: str) -> None:
    family = FAMILIES[name]
    reply = await families[name].reply(tools=TOOLS)
    assert reply.called == [("weather", PARIS), ("time", {})]
    assert (reply.thought, reply.spoken, reply.finish_reason) == (family.thought, family.spoken, "tool_calls")


@pytest.mark.parametrize("name", FAMILIES)
async def test_forced_calls_come_after_thinking(families: dict[str, Asked], name: str) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, schemas in (("required", {"weather": CITY, "time": {}}), (named, {"weather": CITY})):
        reply = await families[name].reply(tools=TOOLS, tool_choice=choice, temperature=1, seed=1, max_tokens=400)
        assert (reply.thought, reply.spoken, reply.finish_reason) == (FAMILIES[name].thought, "", "tool_calls")
        assert reply.calls
        for called, arguments in reply.called:
            jsonschema.validate(arguments, schemas[called])


@pytest.mark.parametrize("name", FAMILIES)
async def test_a_schema_holds_after_thinking(families: dict[str, Asked], name: str) -> None:
    """Wherever in a block the thinking ends; its tokens are counted, also where it is cut off."""
    family = FAMILIES[name]
    reply = await families[name].reply(response_format=FORM, temperature=1, seed=1, max_tokens=400)
    assert (reply.thought, reply.finish_reason) == (family.thought, "stop")
    jsonschema.validate(json.loads(reply.spoken), CITY)
    if not family.thought:
        assert reply.num_thinking_tokens == 0
        return
    assert 0 < reply.num_thinking_tokens < reply.num_tokens
    for most in range(1, reply.num_thinking_tokens):
        cut = await families[name].reply(response_format=FORM, max_tokens=most)
        assert (cut.spoken, cut.finish_reason) == ("", "length")
        assert family.thought.startswith(cut.thought) or cut.thought.startswith(family.thought)  # half a mark is text
        assert cut.num_thinking_tokens <= cut.num_tokens == most


# Where only a mark's text can follow, the grammar library has the tokenizer cut it: not as other scripts do.
@pytest.mark.parametrize("name", ["qwen3", "mistral, thinking"])
async def test_tools_may_be_called_although_an_answer_has_a_form(families: dict[str, Asked], name: str) -> None:
    reply = await families[name].reply(tools=TOOLS, response_format=FORM)
    assert reply.called == [("weather", PARIS), ("time", {})]
    assert (reply.thought, reply.spoken, reply.finish_reason) == (FAMILIES[name].thought, "", "tool_calls")


@pytest.mark.parametrize("name", ["llama pythonic", "gpt-oss"])
async def test_where_calls_may_begin_like_an_answer_the_form_holds(families: dict[str, Asked], name: str) -> None:
    reply = await families[name].reply(tools=TOOLS, response_format=FORM, temperature=1, seed=1, max_tokens=400)
    assert (reply.calls, reply.finish_reason) == ((), "stop")
    jsonschema.validate(json.loads(reply.spoken), CITY)


@pytest.mark.parametrize("name", FAMILIES)
async def test_an_answer_goes_back_into_the_template(families: dict[str, Asked], name: str) -> None:
    """With its thinking, its calls and their results, as an agent sends them."""
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Which weather?"}],
        "tools": TOOLS,
        "max_tokens": 200,
    }
    first = answered(await families[name].http.post("/v1/chat/completions", json=asked | {"temperature": 0}))
    message = first["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "sunny<|end|></think>"}
        for call in message["tool_calls"]
    ]
    reply = await families[name].reply(messages=[*asked["messages"], message, *results], tools=TOOLS)
    assert reply.called == [("weather", PARIS), ("time", {})]


WRONG = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}, "required": ["a"]}
WRONG_TOOL = {"type": "function", "function": {"name": "weather", "parameters": WRONG}}


@pytest.mark.parametrize(
    ("fields", "param", "shown"),
    [
        ({"guided_json": WRONG}, "guided_json", json.dumps(WRONG)[:60]),
        ({"guided_json": WRONG, "tools": TOOLS}, "guided_json", json.dumps(WRONG)[:60]),
        ({"tools": [WRONG_TOOL], "tool_choice": "required"}, "tools", "weather"),
    ],
)
async def test_an_error_shows_the_schema_as_it_was_sent(
    families: dict[str, Asked], fields: dict[str, Any], param: str, shown: str
) -> None:
    """And nothing of what became of it here."""
    body = {"messages": [{"role": "user", "content": "Which weather?"}], "max_tokens": 20, **fields}
    error = refused(await families["qwen3"].http.post("/v1/chat/completions", json=body), 400)
    assert error["param"] == param
    assert shown in error["message"]
    for ours in ("x-guidance", "additionalProperties", "$defs", "start:"):
        assert ours not in error["message"]
