"""A client of the REST side that stops reading its stream: others go on, and what it holds is freed in time."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.fakes.servers import eventually
from tests.fakes.services import FakePair
from tests.gateway.rest.conftest import Rest, completion_body, serving_rest

STALLED_TIMEOUT_S = 1.0
# With the smallest receive buffer a client's side takes a few KB; the server's socket and the transport above it, more.
_SMALLEST_BUFFER = 1


async def ask_for_a_stream(rest: Rest, max_tokens: int) -> socket.socket:
    """Send the request and read nothing of the answer."""
    address = urlsplit(rest.base_url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALLEST_BUFFER)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, (address.hostname, address.port))
    body = json.dumps(completion_body(max_tokens=max_tokens, stream=True, n=8, logprobs=5)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
    await loop.sock_sendall(connection, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


async def rest_of_the_answer(connection: socket.socket) -> bytes:
    """All that was sent, to the last chunk."""
    loop = asyncio.get_running_loop()
    answer = b""
    while not answer.endswith(b"\r\n0\r\n\r\n"):
        part = await loop.sock_recv(connection, 65_536)
        assert part, "the connection ended in mid-answer"
        answer += part
    return answer


@pytest.mark.timeout(60)
async def test_a_reader_that_stops_is_ended_in_time_and_told_why(pair: FakePair, tokenizer_folder: Path) -> None:
    async with serving_rest(pair, tokenizer_folder, stalled_client_timeout_s=STALLED_TIMEOUT_S) as rest:
        connection = await ask_for_a_stream(rest, max_tokens=2000)
        with connection:
            await eventually(lambda: bool(pair.verifier.sessions))
            # Others are served meanwhile.
            assert (await rest.completion(max_tokens=20))["usage"]["completion_tokens"] == 20
            await eventually(rest.is_idle, within_s=20)
            text = (await asyncio.wait_for(rest_of_the_answer(connection), 20)).decode()
        assert text.startswith("HTTP/1.1 200")
        assert "nothing was read for 1 s" in text
        assert '"finish_reason":"length"' not in text, "it was ended before it was done"
