"""Bodies of legal size that are expensive to find wrong: a refusal costs little, and the event loop goes on."""

from __future__ import annotations

import asyncio
import time

import pytest

from gateway.rest.json_route import JsonRequest
from tests.gateway.rest.conftest import Rest, answered, refused

NUM_BYTES = 4 * 1024 * 1024
USER = '"messages":[{"role":"user","content":"a"}]'
FLOODS = {
    "booleans": ("completions", '{"prompt":[', "true", "]}"),
    "objects": ("completions", '{"prompt":[', "{}", "]}"),
    "lists": ("completions", '{"prompt":[', "[1]", "]}"),
    "a wrong token at the end": ("completions", '{"prompt":[', "1", ",true]}"),
    "stops": ("completions", '{"prompt":"a","stop":[', "1", "]}"),
    "choices": ("completions", '{"prompt":"a","guided_choice":[', "1", "]}"),
    "wrong tools": ("chat/completions", "{" + USER + ',"tools":[', "{}", "]}"),
    "right tools": ("chat/completions", "{" + USER + ',"tools":[', '{"type":"function","function":{"name":"a"}}', "]}"),
    "messages": ("chat/completions", '{"messages":[', "{}", "]}"),
    "parts": ("chat/completions", '{"messages":[{"role":"user","content":[', '{"type":"text","text":""}', "]}]}"),
    "unknown fields": ("completions", '{"prompt":"a",', '"KEY":1', "}"),
    "biases": ("completions", '{"prompt":"a","logit_bias":{', '"KEY":1', "}}"),
}


def flood(start: str, item: str, end: str) -> str:
    num_items = NUM_BYTES // (len(item) + 1)
    items = (item.replace("KEY", f"k{index}") for index in range(num_items))
    return start + ",".join(items) + end


@pytest.mark.parametrize("case", FLOODS.values(), ids=FLOODS.keys())
async def test_a_flood_is_refused_soon_and_stalls_nothing(rest: Rest, case: tuple[str, str, str, str]) -> None:
    route, *parts = case
    body = flood(*parts).encode()
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(0.005)
            longest_s = max(longest_s, time.monotonic() - before_s)

    watching = asyncio.create_task(watch())
    headers = {"content-type": "application/json"}
    response = await rest.http.post(f"/v1/{route}", content=body, headers=headers)
    watching.cancel()
    refused(response, 400)
    assert response.elapsed.total_seconds() < 8
    assert longest_s < 3


async def test_a_large_body_is_read_as_a_small_one(rest: Rest) -> None:
    """Beside the event loop, but with the same answers."""
    large = {"prompt": "def f(n):", "max_tokens": 4, "temperature": 0, "metadata": {"x": "y" * 100_000}}
    small = {key: value for key, value in large.items() if key != "metadata"}
    answers = [answered(await rest.http.post("/v1/completions", json=body))["choices"] for body in (large, small)]
    assert answers[0] == answers[1]
    wrong = [refused(await rest.http.post("/v1/completions", json=body | {"n": 0}), 400) for body in (large, small)]
    assert wrong[0] == wrong[1]
    headers = {"content-type": "application/json"}
    broken = await rest.http.post("/v1/completions", content=b'{"prompt":"' + b"x" * 100_000, headers=headers)
    assert refused(broken, 400)["code"] == "invalid_json"
    assert JsonRequest._parsed is None
