"""A client of a gateway whose drafter and verifier are fakes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from easyspec.errors import EasyspecError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.v1 import generation_pb2, generation_pb2_grpc
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.services import FakePair, running

PROMPT = "def f(n):"
Mode = generation_pb2.SpeculationParameters
ServerInfo = generation_pb2.GetServerInfoResponse


@dataclass(frozen=True)
class Client:
    """A client of the gateway under test, and the fakes behind it."""

    stub: Any
    pair: FakePair
    folder: Path

    async def generate(self, timeout_s: float = 20.0, **fields: Any) -> list[generation_pb2.GenerateResponse]:
        request = request_of(**fields)
        return [chunk async for chunk in self.stub.Generate(request, timeout=timeout_s)]

    async def refusal(self, **fields: Any) -> EasyspecError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(**fields)
        return error_from_rpc(caught.value)

    async def info(self) -> generation_pb2.GetServerInfoResponse:
        return await self.stub.GetServerInfo(generation_pb2.GetServerInfoRequest())

    async def until_drafter_is(self, state: int) -> None:
        async with asyncio.timeout(5):
            while (await self.info()).drafter_state != state:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def request_of(
    prompt: str = PROMPT, max_tokens: int | None = 60, temperature: float = 0.0, mode: int = 0, **fields: Any
) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest(**fields)
    if request.WhichOneof("prompt") is None:
        request.text = prompt
    if not request.sampling.HasField("temperature"):
        request.sampling.temperature = temperature
    if max_tokens is not None and not request.stop.HasField("max_tokens"):
        request.stop.max_tokens = max_tokens
    request.speculation.mode = mode  # type: ignore[assignment]
    return request


def tokens(chunks: list[generation_pb2.GenerateResponse]) -> list[int]:
    """All tokens of a stream."""
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def text(chunks: list[generation_pb2.GenerateResponse]) -> str:
    """The whole text of a stream."""
    return "".join(chunk.text for chunk in chunks)


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> float:
    """Seconds until the condition held; fails the test if it never does."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "condition did not come true"
        await asyncio.sleep(0.005)
    return time.monotonic() - started


def settings_for(pair: FakePair, folder: Path, **fields: Any) -> GatewaySettings:
    defaults: dict[str, Any] = {
        "address": "127.0.0.1:0",
        "tokenizer": folder,
        "verifier_address": pair.verifier_service.address,
        "drafter_address": pair.drafter_service.address,
        "draft_deadline_ms": 300,
        "retry_first_ms": 10,
        "retry_max_ms": 50,
        "probe_interval_s": 0.1,
    }
    return GatewaySettings(**(defaults | fields))


@asynccontextmanager
async def gateway(pair: FakePair, folder: Path, **fields: Any) -> AsyncIterator[Client]:
    async with (
        running(GatewayServer(settings_for(pair, folder, **fields))) as service,
        open_channel(service.address) as channel,
    ):
        yield Client(generation_pb2_grpc.GenerationServiceStub(channel), pair, folder)


def expected(client: Client, num_tokens: int = 60, seed: int = 0, prompt_length: int | None = None) -> list[int]:
    """What the toy language says after PROMPT, or after as many tokens as `prompt_length` says."""
    language = client.pair.language
    start = (prompt_length or len(Tokenizer.load(client.folder).encode(PROMPT))) + seed
    return [language.token_ids[(start + i) % len(language.token_ids)] for i in range(num_tokens)]
