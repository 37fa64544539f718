"""Refusals and failures have OpenAI's shape and name what is wrong; the service goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import structlog

from easyspec.errors import CapacityError, DeadlineError, UnavailableError
from tests.gateway.rest.conftest import Rest, chat_body, completion_body, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[Any]]:
    """Events of the service under test; rendering the tracebacks of bugs would take seconds."""
    with structlog.testing.capture_logs() as events:
        yield events


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "fields", "param", "code"),
    [
        (COMPLETIONS, {"bar": 1}, "bar", "unknown_parameter"),
        (COMPLETIONS, {"speculation": {"depth": 1}}, "speculation.depth", "unknown_parameter"),
        (COMPLETIONS, {"suffix": "x"}, "suffix", "unsupported_parameter"),
        (COMPLETIONS, {"prompt": None}, "prompt", "invalid_type"),
        (COMPLETIONS, {"prompt": []}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [[1], "a"]}, "prompt", "invalid_type"),
        (COMPLETIONS, {"prompt": ""}, "prompt", "invalid_value"),
        (COMPLETIONS, {"prompt": [352]}, "prompt[0]", "invalid_value"),
        (COMPLETIONS, {"prompt": [5] * 2048}, "prompt", "context_length_exceeded"),
        (COMPLETIONS, {"temperature": -1}, "temperature", "invalid_value"),
        (COMPLETIONS, {"temperature": "1"}, "temperature", "invalid_type"),
        (COMPLETIONS, {"temperature": True}, "temperature", "invalid_type"),
        (COMPLETIONS, {"top_p": 0}, "top_p", "invalid_value"),
        (COMPLETIONS, {"top_k": 2**40}, "top_k", "invalid_value"),
        (COMPLETIONS, {"min_p": 2}, "min_p", "invalid_value"),
        (COMPLETIONS, {"seed": -(2**63) - 1}, "seed", "invalid_value"),
        (COMPLETIONS, {"seed": 2**64}, "seed", "invalid_value"),
        (COMPLETIONS, {"seed": 10**400}, "seed", "invalid_value"),
        (COMPLETIONS, {"speculation": {"width": 10**400}}, "speculation.width", "invalid_value"),
        (COMPLETIONS, {"speculation": {"max_levels": -(10**400)}}, "speculation.max_levels", "invalid_value"),
        (COMPLETIONS, {"temperature": 10**400}, "temperature", "invalid_type"),
        (COMPLETIONS, {"logit_bias": {"5": 10**400}}, "logit_bias", "invalid_type"),
        (COMPLETIONS, {"best_of": 10**400}, "best_of", "invalid_value"),
        (CHAT, {"logprobs": True, "top_logprobs": 10**400}, "top_logprobs", "invalid_value"),
        (COMPLETIONS, {"n": 0}, "n", "invalid_value"),
        (COMPLETIONS, {"n": 17}, "n", "invalid_value"),
        (COMPLETIONS, {"best_of": 2}, "best_of", "invalid_value"),
        (COMPLETIONS, {"max_tokens": -1}, "max_tokens", "invalid_value"),
        (COMPLETIONS, {"max_tokens": 2**63}, "max_tokens", "invalid_value"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "invalid_value"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs", "invalid_value"),
        (COMPLETIONS, {"stop": ["x" * 1025]}, "stop[0]", "invalid_value"),
        (COMPLETIONS, {"stop": ["x"] * 17}, "stop", "invalid_value"),
        (COMPLETIONS, {"stop_token_ids": [400]}, "stop_token_ids", "invalid_value"),
        (COMPLETIONS, {"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
        (COMPLETIONS, {"logit_bias": {"400": 1}}, "logit_bias", "invalid_value"),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (COMPLETIONS, {"speculation": {"mode": "maybe"}}, "speculation.mode", "invalid_value"),
        (COMPLETIONS, {"speculation": {"max_nodes": 65}}, "speculation.max_nodes", "invalid_value"),
        (COMPLETIONS, {"speculation": {"sources": ["model", "oracle"]}}, "speculation.sources", "invalid_value"),
        (COMPLETIONS, {"speculation": {"layer_parallel_size": 0}}, "speculation.layer_parallel_size", "invalid_value"),
        (COMPLETIONS, {"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "invalid_value"),
        (COMPLETIONS, {"guided_regex": ""}, "guided_regex", "invalid_value"),
        (CHAT, {"messages": []}, "messages", "invalid_value"),
        (CHAT, {"messages": None}, "messages", "invalid_type"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "invalid_value"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "invalid_value"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
        (CHAT, {"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "unsupported_parameter"),
        (CHAT, {"modalities": ["audio"]}, "modalities[0]", "invalid_value"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_value"),
    ],
)
async def test_a_field_that_is_not_allowed_is_named(
    rest: Rest, path: str, fields: dict[str, Any], param: str, code: str
) -> None:
    body = (chat_body if path == CHAT else completion_body)(**fields)
    error = refused(await rest.http.post(path, json=body), 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code), error
    assert param in error["message"]
    assert rest.is_idle()


async def test_a_missing_field_is_named(rest: Rest) -> None:
    error = refused(await rest.http.post(COMPLETIONS, json={}), 400)
    assert (error["param"], error["code"]) == ("prompt", "missing_required_parameter")


async def test_null_means_unset(rest: Rest) -> None:
    names = ("model", "stop", "seed", "top_p", "n", "logprobs", "stream", "suffix", "user", "speculation", "best_of")
    assert (await rest.completion(**dict.fromkeys(names)))["choices"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'"x"',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"\x00\x01",
        b"[" * 100_000,
        b'{"a":' * 5000,
    ],
)
async def test_bodies_that_are_no_json_object(rest: Rest, content: bytes) -> None:
    for path in (COMPLETIONS, CHAT, "/tokenize"):
        response = await rest.http.post(path, content=content, headers={"content-type": "application/json"})
        assert refused(response, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", [f"{CHAT}/", f"/{CHAT}", CHAT.replace("/chat", "//chat")])
async def test_slashes_of_a_path_do_not_matter(rest: Rest, path: str) -> None:
    answer = await rest.http.post(f"{rest.base_url.rstrip('/')}{path}", json=chat_body(max_tokens=1))
    assert answer.status_code == 200, answer.text
    assert (await rest.http.get("/v1/models/")).json() == (await rest.http.get("/v1/models")).json()
    assert "it is at /v1/chat" in refused(await rest.http.post("/chat/completions/", json={}), 404)["message"]


async def test_a_byte_order_mark_is_no_part_of_a_body(rest: Rest) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(chat_body(max_tokens=1)).encode()
    answer = await rest.http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text


async def test_other_content_types_routes_and_methods(rest: Rest) -> None:
    form = await rest.http.post(COMPLETIONS, data={"prompt": "x"})
    assert refused(form, 415)["code"] == "invalid_content_type"
    assert refused(await rest.http.post(COMPLETIONS, content=b"{}"), 415)["code"] == "invalid_content_type"
    for headers, why in (({"content-encoding": "gzip"}, "content-encoding"), ({}, "charset")):
        kind = {"content-type": "application/json" if headers else "application/json; charset=UTF-16"}
        error = refused(await rest.http.post(COMPLETIONS, content=b"{}", headers=headers | kind), 415)
        assert why in error["message"]
    assert refused(await rest.http.get("/v1/nothing"), 404)["code"] == "not_found"
    wrong = await rest.http.get(COMPLETIONS)
    assert refused(wrong, 405)["code"] == "method_not_allowed"
    for path in ("/health", "/v1/models"):  # as probes ask
        head = await rest.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert wrong.headers["allow"] == "POST"
    assert refused(await rest.http.post(COMPLETIONS, json=completion_body(model="gpt-9")), 404) == {
        "message": "model 'gpt-9' is not served here; served: toy-base",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


async def test_a_huge_body_is_refused_and_the_connection_lives_on(rest: Rest) -> None:
    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * (1 << 20)

    huge = await rest.http.post(COMPLETIONS, content=b" " * (20 << 20), headers={"content-type": "application/json"})
    assert refused(huge, 413)["code"] == "request_too_large"
    chunked = await rest.http.post(COMPLETIONS, content=pieces(), headers={"content-type": "application/json"})
    assert refused(chunked, 413)["code"] == "request_too_large"
    assert (await rest.completion())["choices"]


async def test_the_request_id_comes_back(rest: Rest) -> None:
    for response in (
        await rest.http.get("/health", headers={"x-request-id": "abc-123"}),
        await rest.http.post(COMPLETIONS, json={}, headers={"x-request-id": "abc-123"}),
        await rest.http.post(COMPLETIONS, json=completion_body(stream=True), headers={"x-request-id": "abc-123"}),
        await rest.http.get("/nothing", headers={"x-request-id": "abc-123"}),
    ):
        assert response.headers["x-request-id"] == "abc-123"
    made_up = [(await rest.http.get("/health")).headers["x-request-id"] for _ in range(2)]
    assert len(set(made_up)) == 2
    unfit = await rest.http.get("/health", headers={"x-request-id": "x" * 1000})
    assert unfit.headers["x-request-id"] == "x" * 128


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (CapacityError("no KV memory", 2.5), 429, "rate_limit_exceeded"),
        (UnavailableError("lost"), 503, "service_unavailable"),
        (DeadlineError("late"), 504, "timeout"),
        (RuntimeError("secret"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_before_the_first_byte_have_their_status(
    rest: Rest, error: Exception, status: int, code: str, stream: bool
) -> None:
    rest.pair.verifier.error = error
    response = await rest.http.post(COMPLETIONS, json=completion_body(stream=stream))
    told = refused(response, status)
    assert told["code"] == code
    assert "secret" not in told["message"]
    if status == 429:
        assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2500")
        assert told["type"] == "rate_limit_error"
    if status >= 500:
        assert told["type"] == "server_error"
    if status == 500:
        assert response.headers["x-request-id"] in told["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_of_ours_says_nothing_but_the_request_id(
    rest: Rest, logs: list[Any], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(type(rest.gateway.generator), "_check", broken)
    response = await rest.http.post(COMPLETIONS, json=completion_body(stream=stream))
    assert [event["event"] for event in logs if event["event"].startswith("http")] == ["http_bug", "http_finished"]
    message = refused(response, 500)["message"]
    assert message == f"internal error; request id {response.headers['x-request-id']}"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_failure_in_mid_stream_ends_it_with_an_error_event(rest: Rest, path: str) -> None:
    rest.pair.verifier.delay_s = 0.01
    body = (chat_body if path == CHAT else completion_body)(stream=True, max_tokens=1000)
    text = ""
    async with rest.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        async for part in response.aiter_text():
            text += part
            rest.pair.verifier.error = RuntimeError("secret")
    *events, last, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert last.startswith('data: {"error":{"message":"internal error; request id ')
    assert '"type":"server_error","param":null,"code":"internal_error"}}' in last
    assert len(events) >= 1
    assert "secret" not in text


async def test_garbage_instead_of_http_is_refused_by_the_server(rest: Rest) -> None:
    url = httpx.URL(rest.base_url)
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"nonsense\r\n\r\n"):
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(garbage)
        answer = await asyncio.wait_for(reader.read(100), 5)
        assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 405")), answer
        writer.close()
    assert (await rest.completion())["choices"]
