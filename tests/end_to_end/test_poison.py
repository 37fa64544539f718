"""Requests that the grammar library does not survive: their senders are refused, and nothing else happens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from easyspec.cli.clients import GatewayClient
from easyspec.cli.processes import FREE_PORT, ServiceStack, StackSettings
from easyspec.speculation.parameters import StopConditions
from tests.end_to_end.test_failover import FLAGS, GREEDY

SMALLEST = -(2**63)
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"n": {"const": SMALLEST}}, "required": ["n"]}}
POISONS: dict[str, tuple[str, dict[str, Any]]] = {
    "const": ("completions", {"guided_json": {"const": SMALLEST}}),
    "enum": ("completions", {"guided_json": {"enum": [1, SMALLEST]}}),
    "bounds": ("completions", {"guided_json": {"type": "integer", "minimum": SMALLEST, "maximum": SMALLEST + 5}}),
    "within Lark": ("completions", {"guided_grammar": f'start: %json {{"const": {SMALLEST}}}'}),
    "a required tool": (
        "chat/completions",
        {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
    ),
    "endless": ("completions", {"guided_json": {"type": "integer", "multipleOf": 2**31}}),
}


@pytest.fixture
async def stack() -> AsyncIterator[ServiceStack]:
    settings = StackSettings(num_verifiers=2, flags=FLAGS, http_address=FREE_PORT)
    async with ServiceStack(settings, lambda role, line: None) as stack:
        yield stack


@pytest.mark.slow
async def test_poison_is_refused_and_everybody_else_is_served(stack: ServiceStack) -> None:
    before = [(process.role, process.pid) for process in stack.processes]
    flags = replace(GREEDY, stop=StopConditions(400, ignore_eos=True))
    async with (
        GatewayClient(stack.gateway_address) as client,
        httpx.AsyncClient(base_url=f"http://{stack.http_address}/v1", timeout=60) as http,
    ):

        async def said() -> list[int]:
            return [token_id async for response in client.generate(flags) for token_id in response.token_ids]

        undisturbed = await said()
        streams = [asyncio.create_task(said()) for _ in range(2)]
        poisons = [asyncio.create_task(poison(http, *each)) for each in POISONS.values()]
        started_s = time.monotonic()
        fields = {"prompt": "a", "max_tokens": 8, "guided_json": {"const": 7}}
        ordinary = await http.post("/completions", json=fields)
        assert json.loads(ordinary.json()["choices"][0]["text"]) == 7
        assert time.monotonic() - started_s < 10
        for response in await asyncio.gather(*poisons):
            assert response.status_code == 400, response.text
            assert "what can be compiled and followed" in response.json()["error"]["message"]
        assert await asyncio.gather(*streams) == [undisturbed, undisturbed]
    assert [(process.role, process.pid) for process in stack.processes] == before
    assert all(process.is_running for process in stack.processes)


async def poison(http: httpx.AsyncClient, route: str, fields: dict[str, Any]) -> httpx.Response:
    prompt: dict[str, Any] = (
        {"prompt": "a"} if route == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    )
    return await http.post(f"/{route}", json=prompt | {"max_tokens": 2} | fields)
