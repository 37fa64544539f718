"""Whatever is sent, the answer is no server error, the service goes on, and nothing is left behind."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings

from gateway.rest.app import create_routes
from tests.fakes.servers import eventually
from tests.fakes.services import FakePair, ToyLanguage, running_pair
from tests.fakes.threads import in_thread
from tests.gateway.rest.conftest import Rest, chat_body, completion_body, serving_rest

# Short enough that an answer that is not limited costs little.
MAX_MODEL_LEN = 64
SCHEMA = schemathesis.openapi.from_dict(create_routes(None).openapi())  # type: ignore[arg-type]
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}

DEEP: Any = 1
for _ in range(150):
    DEEP = [DEEP]
VALUES: list[Any] = [None, True, -1, 0, 1e308, -0.0, 10**30, 2**63, "", "\x00", "😀" * 100, [], {}, [[]], [{}], DEEP]
VALUES += ["x" * 10_000, [0] * 1000, {"type": "json_object"}, {"type": "text", "text": 1}, ["a", 1, None], [[1], ["a"]]]
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", completion_body(max_tokens=8, logprobs=1, stop=["x"], n=2, logit_bias={"5": 1})),
    ("/v1/completions", completion_body(max_tokens=8, stream=True, stream_options={"include_usage": True}, echo=True)),
    (
        "/v1/chat/completions",
        chat_body(
            max_tokens=8,
            top_k=3,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        ),
    ),
    (
        "/v1/chat/completions",
        chat_body(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}], tool_choice="auto"),
    ),
    (
        "/v1/chat/completions",
        chat_body(
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
                {
                    "role": "assistant",
                    "reasoning_content": "x",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "x"},
            ],
            max_tokens=8,
            min_tokens=2,
            include_stop_str_in_output=True,
            chat_template_kwargs={"enable_thinking": False},
            guided_json={"type": "array", "uniqueItems": True, "oneOf": [{}, {"not": {}}]},
        ),
    ),
    (
        "/v1/responses",
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "1", "output": "x"},
            ],
            "max_output_tokens": 8,
            "tools": [{"type": "function", "name": "f", "parameters": {}}],
            "tool_choice": "auto",
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
            "reasoning": {"effort": "none"},
        },
    ),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 8, "stream": True, "instructions": "x", "top_logprobs": 1}),
    (
        "/v1/messages",
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}]},
            ],
            "max_tokens": 8,
            "system": [{"type": "text", "text": "x"}],
            "tools": [{"name": "f", "input_schema": {}}],
            "tool_choice": {"type": "auto"},
            "stop_sequences": ["x"],
        },
    ),
    ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": True}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/tokenize", {"prompt": "x", "return_token_strs": True}),
    (
        "/tokenize",
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "chat_template_kwargs": {"enable_thinking": True},
            "add_generation_prompt": True,
            "thinking": {"type": "disabled"},
        },
    ),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]
# On a busy machine; one that never comes is a slot that is lost.
REPLY_TIMEOUT_S = 100.0
SURFACES = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize")
HEADERS: list[dict[str, str]] = [
    {"content-type": "application/json"},
    {"content-type": "application/json; charset=utf-16"},
    {"content-type": "text/plain"},
    {"content-type": "application/json", "x-request-id": "\x7f" * 300},
    {"content-type": "application/json", "accept": "image/png", "content-encoding": "gzip"},
]


@asynccontextmanager
async def short_lived(language: ToyLanguage, folder: Path) -> AsyncIterator[Rest]:
    short = replace(language, max_model_len=MAX_MODEL_LEN)
    async with running_pair(short) as pair, serving_rest(pair, folder) as rest:
        yield rest


@pytest.fixture(scope="module")
def threaded_rest(language: ToyLanguage, tokenizer_folder: Path) -> Iterator[Rest]:
    with in_thread(lambda: short_lived(language, tokenizer_folder)) as rest:
        yield rest
        assert httpx.get(f"{rest.base_url}/health", trust_env=False).status_code == 200


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        yield session


def check_case(case: Any, rest: Rest, session: requests.Session) -> None:
    response = case.call(base_url=rest.base_url.rstrip("/"), session=session, timeout=REPLY_TIMEOUT_S)
    assert response.status_code < 500, (response.status_code, response.text)
    if response.status_code >= 400 and response.headers.get("content-type") == "application/json":
        assert {"message", "type", "param", "code"} == set(response.json()["error"])


@SCHEMA.parametrize()
@settings(max_examples=6, **QUIET)
def test_by_the_openapi_document(case: Any, threaded_rest: Rest, session: requests.Session) -> None:
    check_case(case, threaded_rest, session)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("surface", SURFACES)
def test_by_the_openapi_document_at_length(
    surface: str, threaded_rest: Rest, session: requests.Session, num_fuzz_requests: int, fuzz_seed: int
) -> None:
    operations = [one.ok() for one in SCHEMA.get_all_operations() if one.ok().path.startswith(surface)]
    for operation in operations:

        @seed(fuzz_seed)
        @given(case=operation.as_strategy())
        @settings(max_examples=max(1, num_fuzz_requests // len(operations)), **QUIET)
        def check(case: Any) -> None:
            check_case(case, threaded_rest, session)

        check()


def mutated(random_: random.Random, surface: str) -> tuple[str, bytes, dict[str, str]]:
    """A path that begins with `surface`, a body that is probably wrong, and headers."""
    path, body = random_.choice([one for one in BODIES if one[0].startswith(surface)])
    body = json.loads(json.dumps(body))
    for _ in range(random_.randint(1, 2)):
        target: Any = body
        while True:
            key = random_.choice(list(target) if isinstance(target, dict) else range(len(target)))
            if isinstance(target[key], dict | list) and target[key] and random_.random() < 0.6:
                target = target[key]
                continue
            break
        change = random_.random()
        if change < 0.75:
            target[key] = copy.deepcopy(random_.choice(VALUES))
        elif change < 0.9 or isinstance(target, list):
            del target[key]
        else:
            target[random_.choice(["bar", "n", "prompt", "messages", "guided_regex", "guided_json"])] = random_.choice(
                VALUES
            )
        if not body:
            break
    raw = bytearray(json.dumps(body).encode())
    if random_.random() < 0.2:
        for _ in range(random_.randint(1, 5)):
            raw[random_.randrange(len(raw))] = random_.randrange(256)
    if random_.random() < 0.1:
        del raw[random_.randrange(len(raw)) :]
    return path, bytes(raw), HEADERS[0] if random_.random() < 0.85 else random_.choice(HEADERS)


async def check_mutations(rest: Rest, num_requests: int, random_seed: int, surface: str = "/") -> None:
    random_ = random.Random(random_seed)
    statuses: dict[int, int] = {}
    places = asyncio.Semaphore(8)

    async def send(path: str, body: bytes, headers: dict[str, str]) -> None:
        async with places:
            try:
                response = await rest.http.post(path, content=body, headers=headers, timeout=REPLY_TIMEOUT_S)
            except httpx.ReadTimeout:
                pytest.fail(f"no reply to {path}: {body[:500]!r}")
        assert response.status_code < 500, (path, body[:500], response.text)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    for _ in range(0, num_requests, 100):
        await asyncio.gather(*(send(*mutated(random_, surface)) for _ in range(100)))
    assert {200, 400} <= set(statuses), statuses
    assert (await rest.http.get("/health")).status_code == 200
    await eventually(rest.is_idle)
    assert rest.gateway.generator.num_running == 0


async def test_mutated_requests(language: ToyLanguage, tokenizer_folder: Path) -> None:
    async with short_lived(language, tokenizer_folder) as rest:
        await check_mutations(rest, 400, 1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("surface", SURFACES)
async def test_mutated_requests_at_length(
    language: ToyLanguage, tokenizer_folder: Path, surface: str, num_fuzz_requests: int, fuzz_seed: int
) -> None:
    async with short_lived(language, tokenizer_folder) as rest:
        await check_mutations(rest, num_fuzz_requests, fuzz_seed, surface)


def test_nothing_was_left_behind(threaded_rest: Rest) -> None:
    """Last in this file: after all that schemathesis has sent."""
    pair: FakePair = threaded_rest.pair
    assert not pair.verifier.sessions
    assert not pair.drafter.sessions
    assert threaded_rest.gateway.generator.num_running == 0
