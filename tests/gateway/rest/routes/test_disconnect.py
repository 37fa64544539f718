"""A client that goes away frees everything at once, at both services."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from tests.fakes.servers import eventually
from tests.gateway.rest.conftest import Rest, chat_body, completion_body, events_of

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("path", "body", "num_sessions"),
    [
        ("/v1/completions", completion_body(stream=True, max_tokens=1900), 1),
        ("/v1/chat/completions", chat_body(stream=True, max_tokens=1900), 1),
        ("/v1/completions", completion_body(stream=True, max_tokens=1900, n=3, prompt=["a", "b"]), 6),
    ],
)
async def test_in_mid_stream(rest: Rest, path: str, body: dict[str, Any], num_sessions: int) -> None:
    rest.pair.verifier.delay_s = 0.02
    async with rest.http.stream("POST", path, json=body) as response:
        parts = response.aiter_bytes()
        for _ in range(4):
            await anext(parts)
        await eventually(lambda: len(rest.pair.verifier.sessions) == len(rest.pair.drafter.sessions) == num_sessions)
    await eventually(rest.is_idle)
    await eventually(lambda: rest.gateway.generator.num_running == 0)


async def test_while_it_waits_for_the_whole_answer(rest: Rest) -> None:
    rest.pair.verifier.delay_s = 0.02
    waiting = asyncio.create_task(rest.http.post("/v1/chat/completions", json=chat_body(max_tokens=1900, n=2)))
    await eventually(lambda: len(rest.pair.verifier.sessions) == len(rest.pair.drafter.sessions) == 2)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await eventually(rest.is_idle)
    await eventually(lambda: rest.gateway.generator.num_running == 0)


async def test_before_the_first_token(rest: Rest) -> None:
    rest.pair.verifier.delay_s = 5.0
    waiting = asyncio.create_task(rest.http.post("/v1/completions", json=completion_body(stream=True)))
    await eventually(lambda: len(rest.pair.verifier.sessions) == 1)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await eventually(rest.is_idle)


async def test_it_is_no_bug_of_ours(rest: Rest) -> None:
    """It is not counted as one, which would wake an operator, and its status is 499."""
    rest.pair.verifier.delay_s = 0.02
    for stream in (False, True):
        waiting = asyncio.create_task(
            rest.http.post("/v1/completions", json=completion_body(max_tokens=1900, stream=stream))
        )
        await eventually(lambda: len(rest.pair.verifier.sessions) == 1)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await eventually(rest.is_idle)
    await eventually(lambda: rest.gateway.generator.num_running == 0)
    metrics = (await rest.http.get("/metrics")).text
    assert 'reason="INTERNAL"' not in metrics
    lines = [line for line in metrics.splitlines() if "completions" in line and "http_requests_total" in line]
    assert any('status="499"' in line for line in lines)
    assert not any('status="500"' in line for line in lines)


async def test_many_streams_at_once_are_all_whole(rest: Rest) -> None:
    async def stream(num_tokens: int) -> str:
        body = completion_body(stream=True, max_tokens=num_tokens)
        response = await rest.http.post("/v1/completions", json=body)
        return "".join(event["choices"][0]["text"] for event in events_of(response.text))

    texts = await asyncio.gather(*(stream(100 + i) for i in range(32)))
    longest = texts[-1]
    assert all(longest.startswith(text.rstrip("\ufffd")) for text in texts)
    assert len({len(text) for text in texts}) > 20
    await eventually(rest.is_idle)
