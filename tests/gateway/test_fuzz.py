"""Whatever message comes over gRPC, the answer is no INTERNAL, the gateway goes on, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from typing import Any

import grpc
import pytest

from easyspec.v1 import generation_pb2
from tests.gateway.gateway_client import Client, eventually

TEXTS = [
    "",
    "x",
    "assistant",
    "user",
    "{}",
    '{"type": "array", "uniqueItems": true}',
    "[a-z]{1,3}",
    "<|endoftext|>",
    "\x00é😀",
]
NUMBERS = [0, 1, 2, 5, 7, 16, 64, 100, 351, 352, 2**31, 2**32 - 1]


def filled(message: Any, random_: random.Random, depth: int = 0) -> Any:
    """The message with some of its fields set to anything that fits the wire."""
    for field in message.DESCRIPTOR.fields:
        if random_.random() < 0.55 + 0.1 * depth:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name)[random_.choice(NUMBERS)] = random_.choice(
                [0.0, 1.0, -100.0, 1e30, float("nan")]
            )
        elif field.message_type is not None:
            if field.is_repeated:
                for _ in range(random_.randint(1, 3)):
                    filled(getattr(message, field.name).add(), random_, depth + 1)
            else:
                filled(getattr(message, field.name), random_, depth + 1)
                getattr(message, field.name).SetInParent()
        elif field.is_repeated:
            getattr(message, field.name).extend(value_of(field, random_) for _ in range(random_.randint(1, 3)))
        else:
            setattr(message, field.name, value_of(field, random_))
    return message


def value_of(field: Any, random_: random.Random) -> Any:
    kinds = field.CPPTYPE_STRING, field.CPPTYPE_BOOL, field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE, field.CPPTYPE_ENUM
    if field.cpp_type == kinds[0]:
        return random_.choice(TEXTS)
    if field.cpp_type == kinds[1]:
        return random_.random() < 0.5
    if field.cpp_type in kinds[2:4]:
        return random_.choice([0.0, 0.5, 1.0, -1.0, 1e30, float("inf"), float("nan")])
    if field.cpp_type == kinds[4]:
        return random_.choice([0, 1, 2, 3, 4, 99])
    return random_.choice(NUMBERS)


async def check_messages(client: Client, num_requests: int, seed: int) -> None:
    random_ = random.Random(seed)
    codes: Counter[Any] = Counter()
    places = asyncio.Semaphore(8)

    async def send(request: generation_pb2.GenerateRequest) -> None:
        async with places:
            rpc = client.stub.Generate(request, timeout=20)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in rpc:
                    pass
        code = await rpc.code()
        assert code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), (request, await rpc.details())
        codes[code] += 1

    for _ in range(0, num_requests, 50):
        requests = [filled(generation_pb2.GenerateRequest(), random_) for _ in range(50)]
        for request in requests:
            if random_.random() < 0.5:  # else few would get past the first checks
                request.model, request.sampling.temperature, request.sampling.top_p = "", 0.0, 1.0
                request.text = "def f(n):"
            if not 1 <= request.stop.max_tokens <= 64:
                request.stop.max_tokens = 8
        await asyncio.gather(*map(send, requests))
    assert {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT} <= set(codes), codes
    await eventually(lambda: not client.pair.verifier.sessions and not client.pair.drafter.sessions)
    assert (await client.info()).num_running_requests == 0


async def test_messages_of_any_kind(client: Client) -> None:
    await check_messages(client, 400, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(7200)
async def test_messages_at_length(client: Client, num_fuzz_requests: int, fuzz_seed: int) -> None:
    await check_messages(client, num_fuzz_requests, fuzz_seed)
