"""A gateway that serves REST on a free port, over fakes; and a plain HTTP client of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from tests.fakes.services import FakePair, running

PROMPT = "def f(n):"


@dataclass(frozen=True)
class Rest:
    """The gateway under test, the fakes behind it, and a client."""

    http: httpx.AsyncClient
    gateway: GatewayServer
    pair: FakePair

    @property
    def base_url(self) -> str:
        return str(self.http.base_url)

    async def completion(self, **fields: Any) -> dict[str, Any]:
        return answered(await self.http.post("/v1/completions", json=completion_body(**fields)))

    async def chat(self, **fields: Any) -> dict[str, Any]:
        return answered(await self.http.post("/v1/chat/completions", json=chat_body(**fields)))

    async def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, decoded, without `[DONE]`, which must be the last."""
        response = await self.http.post(path, json=body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.text)

    def is_idle(self) -> bool:
        return not self.pair.verifier.sessions and not self.pair.drafter.sessions


def completion_body(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": 60, "temperature": 0} | fields


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 60, "temperature": 0} | fields


def answered(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a refusal, whose body has OpenAI's shape."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def events_of(text: str) -> list[dict[str, Any]]:
    assert text.endswith("data: [DONE]\n\n")
    parts = text.split("\n\n")
    assert parts[-1] == ""
    assert all(part.startswith("data: ") and "\n" not in part for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@asynccontextmanager
async def serving_rest(pair: FakePair, tokenizer_folder: Path, **fields: Any) -> AsyncIterator[Rest]:
    settings: dict[str, Any] = {
        "address": "127.0.0.1:0",
        "http_address": "127.0.0.1:0",
        "tokenizer": tokenizer_folder,
        "verifier_address": pair.verifier_service.address,
        "drafter_address": pair.drafter_service.address,
    }
    server = GatewayServer(GatewaySettings(**(settings | fields)))
    async with running(server):
        base_url = f"http://127.0.0.1:{server.http_port}"
        async with httpx.AsyncClient(base_url=base_url, timeout=20, trust_env=False) as http:
            yield Rest(http, server, pair)


@pytest.fixture
async def rest(pair: FakePair, tokenizer_folder: Path) -> AsyncIterator[Rest]:
    async with serving_rest(pair, tokenizer_folder) as rest:
        yield rest
