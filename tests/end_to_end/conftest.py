"""Real services over engines that all tests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from drafter_service.engine import DrafterEngine
from drafter_service.server import DrafterServer
from easyspec.rpc.channels import open_channel
from easyspec.v1 import generation_pb2, generation_pb2_grpc
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from tests.fakes.servers import LentEngine, serving
from tests.fakes.services import RunningService
from tests.fakes.services import running as running_service
from verifier_service.engine import VerifierEngine
from verifier_service.server import VerifierServer

Speculation = generation_pb2.SpeculationParameters


@dataclass(frozen=True)
class Reply:
    """What a client saw; `blocks` are the tokens of each round."""

    text: str
    blocks: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[Any, ...], ...]
    completion: generation_pb2.Completion
    num_accepted: int

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for block in self.blocks for token_id in block)

    @property
    def said(self) -> tuple[Any, ...]:
        """What must not depend on the drafter."""
        completion = self.completion
        ending = (completion.finish_reason, completion.token_id, completion.stop_string)
        return self.text, self.token_ids, self.logprobs, ending, completion.usage.num_output_tokens


def _logprobs(entry: Any) -> tuple[Any, ...]:
    return entry.logprob, tuple(entry.top_token_ids), tuple(entry.top_logprobs)


@dataclass(frozen=True)
class Stack:
    """A gateway over real services. The drafter may be killed and started again."""

    stub: Any
    drafter: RunningService
    drafter_engine: DrafterEngine

    async def ask(self, request: generation_pb2.GenerateRequest, **speculation: Any) -> Reply:
        """The reply to a copy of `request`; without `speculation` plain decoding's, else with a budget of these."""
        copy = generation_pb2.GenerateRequest()
        copy.CopyFrom(request)
        copy.speculation.mode = Speculation.MODE_ON if speculation else Speculation.MODE_OFF
        copy.speculation.layer_plan.layer_parallel_size = 1  # exact, so that blocks are as long as they can be
        for name, value in speculation.items():
            setattr(copy.speculation.budget, name, value)
        return reply([chunk async for chunk in self.stub.Generate(copy, timeout=60)])

    async def until_drafter_is_ready(self) -> None:
        """Until the gateway has found the drafter again."""
        ready = generation_pb2.GetServerInfoResponse.PEER_STATE_READY
        async with asyncio.timeout(10):
            while (await self.stub.GetServerInfo(generation_pb2.GetServerInfoRequest())).drafter_state != ready:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


def reply(chunks: Sequence[generation_pb2.GenerateResponse]) -> Reply:
    return Reply(
        text="".join(chunk.text for chunk in chunks),
        blocks=tuple(tuple(chunk.token_ids) for chunk in chunks),
        logprobs=tuple(_logprobs(entry) for chunk in chunks for entry in chunk.logprobs),
        completion=chunks[-1].completion,
        num_accepted=sum(chunk.num_accepted for chunk in chunks),
    )


@asynccontextmanager
async def running_stack(verifier: VerifierEngine, drafter: DrafterEngine, tokenizer: Path) -> AsyncIterator[Stack]:
    """Verifier, drafter and gateway over gRPC on free ports."""
    async with AsyncExitStack() as stack:
        verifier_address = await stack.enter_async_context(serving(VerifierServer(LentEngine(verifier))))
        drafter_service = await stack.enter_async_context(running_service(DrafterServer(LentEngine(drafter))))
        settings = GatewaySettings(
            tokenizer=tokenizer,
            verifier_address=verifier_address,
            drafter_address=drafter_service.address,
            retry_first_ms=10,
            retry_max_ms=50,
            draft_deadline_ms=20_000,
        )
        gateway_address = await stack.enter_async_context(serving(GatewayServer(settings)))
        channel = await stack.enter_async_context(open_channel(gateway_address))
        yield Stack(generation_pb2_grpc.GenerationServiceStub(channel), drafter_service, drafter)


@pytest.fixture
async def stack(verifier: VerifierEngine, twin_drafter: DrafterEngine, base_folder: Path) -> AsyncIterator[Stack]:
    """A drafter that is right as often as can be: blocks are long."""
    async with running_stack(verifier, twin_drafter, base_folder) as stack:
        yield stack


@pytest.fixture
async def fuzzy_stack(verifier: VerifierEngine, drafter: DrafterEngine, base_folder: Path) -> AsyncIterator[Stack]:
    """A drafter that is often wrong."""
    async with running_stack(verifier, drafter, base_folder) as stack:
        yield stack
