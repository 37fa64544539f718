"""While a prompt is read nothing is silent for long: the status leaves at once, and comments follow."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.rest import sse
from tests.fakes.servers import eventually
from tests.fakes.services import FakePair
from tests.gateway.rest.conftest import Rest, chat_body, completion_body, events_of, refused, serving_rest


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", chat_body(max_tokens=3)), ("/v1/completions", completion_body(max_tokens=3, n=2))],
)
async def test_the_status_comes_before_the_first_token(
    rest: Rest, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, object]
) -> None:
    monkeypatch.setattr(sse, "COMMENT_INTERVAL_S", 0.2)
    rest.pair.verifier.delay_s = 1.0
    started_s = time.monotonic()
    async with rest.http.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert time.monotonic() - started_s < 0.8
        text = "".join([part async for part in response.aiter_text()])
    comments = [line for line in text.splitlines() if line.startswith(":")]
    assert len(comments) >= 3
    events_of("\n\n".join(part for part in text.split("\n\n") if not part.startswith(":")))
    await eventually(rest.is_idle)


async def test_what_fails_later_is_an_event(rest: Rest) -> None:
    rest.pair.verifier.delay_s = 0.6
    rest.pair.verifier.error = RuntimeError("a bug")
    async with rest.http.stream("POST", "/v1/chat/completions", json=chat_body(stream=True)) as response:
        assert response.status_code == 200
        text = "".join([part async for part in response.aiter_text()])
    (event,) = events_of(text)
    assert event["error"]["code"] == "internal_error"


async def test_a_client_that_goes_away_while_the_prompt_is_read_ends_the_request(rest: Rest) -> None:
    rest.pair.verifier.delay_s = 5.0
    with pytest.raises(httpx.ReadTimeout):
        await rest.http.post("/v1/completions", json=completion_body(stream=True), timeout=0.8)
    async with asyncio.timeout(2):
        await eventually(rest.is_idle)


async def test_unknown_fields_may_be_ignored_which_the_reply_tells(pair: FakePair, tokenizer_folder: Path) -> None:
    async with serving_rest(pair, tokenizer_folder, unknown_fields="ignore") as rest:
        body = chat_body(max_tokens=2, made_up=7, audio={"voice": "x"}, chat_template_kwargs={"depth": 3})
        body["messages"][0]["mood"] = "sad\r\n"
        for one in (body, body | {"stream": True}):
            response = await rest.http.post("/v1/chat/completions", json=one)
            assert response.status_code == 200, response.text
            assert set(response.headers["x-ignored-fields"].split(", ")) == {"made_up", "audio", "mood"}
        assert "x-ignored-fields" not in (await rest.http.post("/v1/completions", json=completion_body())).headers
        families = text_string_to_metric_families((await rest.http.get("/metrics")).text)
        (counted,) = (one for one in families if one.name == "easyspec_http_requests_with_ignored_fields")
        (sample,) = (one for one in counted.samples if one.name.endswith("_total"))
        assert sample.value == 2
        refused(await rest.http.post("/v1/chat/completions", json=body | {"temperature": "hot"}), 400)
