"""Bytes that are not gRPC, gRPC messages that are not requests: the status blames the sender, and nothing is left."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from easyspec.v1 import generation_pb2, types_pb2
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from tests.fakes.servers import eventually
from tests.fakes.services import FakePair, running

GENERATE = "/easyspec.v1.GenerationService/Generate"
VALID = generation_pb2.GenerateRequest(
    text="def f(n):",
    sampling=types_pb2.SamplingParameters(temperature=0.5, top_k=5, seed=1, logit_bias={3: 1.0}),
    stop=types_pb2.StopConditions(max_tokens=3, stop_token_ids=[1]),
    stop_strings=["x"],
    num_choices=2,
)
# What a sender may be told; INTERNAL and UNKNOWN would be bugs of ours.
BLAMES_THE_SENDER = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


@pytest.fixture
async def address(pair: FakePair, tokenizer_folder: Path) -> AsyncIterator[str]:
    settings = GatewaySettings(
        address="127.0.0.1:0",
        tokenizer=tokenizer_folder,
        verifier_address=pair.verifier_service.address,
        drafter_address=pair.drafter_service.address,
    )
    async with running(GatewayServer(settings)) as service:
        yield service.address


def mutated(rng: random.Random, message: bytes) -> bytes:
    """A few bytes changed, cut out, put in or repeated; sometimes nothing but noise."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(200))
    content = bytearray(message)
    for _ in range(rng.randrange(1, 6)):
        place = rng.randrange(len(content) + 1)
        kind = rng.randrange(4)
        if kind == 0 and content:
            content[place % len(content)] = rng.randrange(256)
        elif kind == 1:
            del content[place : place + rng.randrange(1, 8)]
        elif kind == 2:
            content[place:place] = rng.randbytes(rng.randrange(1, 8))
        else:
            content += content[place:]
    return bytes(content)


async def status_of(channel: grpc.aio.Channel, message: bytes) -> grpc.StatusCode:
    call = channel.unary_stream(GENERATE)(message, timeout=20)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def is_served(channel: grpc.aio.Channel) -> bool:
    return await status_of(channel, VALID.SerializeToString()) is grpc.StatusCode.OK


def is_idle(pair: FakePair) -> bool:
    return not pair.verifier.sessions and not pair.drafter.sessions


async def test_messages_that_are_no_requests_are_refused(address: str, pair: FakePair) -> None:
    rng = random.Random(0)
    valid = VALID.SerializeToString()
    async with grpc.aio.insecure_channel(address) as channel:
        for index in range(400):
            message = mutated(rng, valid)
            status = await status_of(channel, message)
            assert status in BLAMES_THE_SENDER, (index, status, message)
        assert await is_served(channel)
    await eventually(lambda: is_idle(pair))


async def test_bytes_that_are_no_grpc_do_no_harm(address: str, pair: FakePair) -> None:
    rng = random.Random(0)
    host, _, port = address.rpartition(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    settings_frame = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    for start in (b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + settings_frame, b"\x16\x03\x01\x02\x00"):
        for _ in range(10):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(start + rng.randbytes(rng.randrange(300)))
            writer.write_eof()
            async with asyncio.timeout(20):
                while await reader.read(65_536):
                    pass
            writer.close()
    async with grpc.aio.insecure_channel(address) as channel:
        assert await is_served(channel)
    await eventually(lambda: is_idle(pair))
