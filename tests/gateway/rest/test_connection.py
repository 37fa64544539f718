"""What a connection may cost before its client is known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gateway.rest import connection, server
from tests.fakes.services import FakePair
from tests.gateway.rest.conftest import Rest, completion_body, serving_rest

GET = b"GET /version HTTP/1.1\r\nhost: localhost\r\n"


@asynccontextmanager
async def connected(rest: Rest) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", rest.gateway.http_port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def answer_to(rest: Rest, *parts: bytes, repeat: bytes = b"") -> bytes:
    """What is said until the connection ends, however much more there would be to send."""
    async with connected(rest) as (reader, writer):
        for part in parts:
            writer.write(part)
        for _ in range(64):
            writer.write(repeat * 16)
            try:
                await writer.drain()
            except ConnectionError:
                break
        try:
            return await asyncio.wait_for(reader.read(), 5)
        except ConnectionError:
            return b"reset"


@pytest.mark.parametrize(
    ("start", "repeat"),
    [
        (b"GET /version HTTP/1.1\r\nx: ", b"y" * 1024),
        (b"GET /version?", b"y" * 1024),
        (GET, b"x: y\r\n" * 128),
        (b"", b"\r\n" * 512),
    ],
    ids=["header", "URL", "headers", "empty lines"],
)
async def test_a_head_without_end_is_refused_before_it_takes_memory(rest: Rest, start: bytes, repeat: bytes) -> None:
    answer = await answer_to(rest, start, repeat=repeat)
    assert answer == b"reset" or answer.startswith(b"HTTP/1.1 431 ")


async def test_a_head_that_is_too_large_at_once_is_refused(rest: Rest) -> None:
    answer = await answer_to(rest, GET + b"x: " + b"y" * 70_000 + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    answer = await answer_to(rest, GET + b"connection: close\r\nx: " + b"y" * 60_000 + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("said", [b"", GET, b"\r\n", GET + b"\r\n" + GET, GET + b"\r\n\r\n\r\n"], ids=repr)
async def test_a_head_must_come_in_time(rest: Rest, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HEAD_TIMEOUT_S", 0.3)
    async with connected(rest) as (reader, writer):
        writer.write(said)
        if said.startswith(GET + b"\r\n"):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"x")
        started_s = time.monotonic()
        await asyncio.wait_for(reader.read(), 5)
        assert time.monotonic() - started_s < 3


@pytest.mark.parametrize("num_bytes", [70_000, 300_000, 2_000_000])
async def test_a_body_is_no_head(rest: Rest, num_bytes: int) -> None:
    for _ in range(2):  # over one connection
        body = completion_body(max_tokens=2, metadata={"x": "y" * num_bytes})
        assert (await rest.http.post("/v1/completions", json=body)).status_code == 200


async def test_a_request_under_way_is_not_hurried(rest: Rest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HEAD_TIMEOUT_S", 0.2)
    rest.pair.verifier.delay_s = 0.05
    response = await rest.http.post("/v1/completions", json=completion_body(max_tokens=100))
    assert response.elapsed.total_seconds() > 0.4
    assert response.status_code == 200


async def test_the_connection_that_is_idle_longest_makes_room(
    pair: FakePair, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "most_connections", lambda: 4)
    async with serving_rest(pair, tokenizer_folder) as rest:
        pair.verifier.delay_s = 0.02
        body = completion_body(max_tokens=60, speculation={"mode": "off"})
        busy = asyncio.create_task(rest.http.post("/v1/completions", json=body))
        while not pair.verifier.sessions:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        ends: list[asyncio.Task[bytes]] = []
        async with connected(rest) as (first, _), connected(rest) as (second, _), connected(rest) as (third, _):
            ends = [asyncio.create_task(reader.read()) for reader in (first, second, third)]
            await asyncio.sleep(0.1)
            answer = await answer_to(rest, GET + b"connection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert [end.done() for end in ends] == [True, False, False]
        await asyncio.gather(*ends)
        assert (await busy).status_code == 200


async def test_if_all_are_busy_a_new_one_is_refused(
    pair: FakePair, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "most_connections", lambda: 1)
    async with serving_rest(pair, tokenizer_folder) as rest:
        pair.verifier.delay_s = 0.02
        body = completion_body(max_tokens=60, speculation={"mode": "off"})
        busy = asyncio.create_task(rest.http.post("/v1/completions", json=body))
        while not pair.verifier.sessions:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert (await answer_to(rest, GET + b"\r\n")).startswith(b"HTTP/1.1 503 ")
        assert (await busy).status_code == 200
