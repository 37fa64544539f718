"""API keys, TLS, limits, deadlines and metrics of the REST port."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from easyspec.errors import ConfigurationError
from easyspec.settings import load_settings
from gateway.service.config import GatewaySettings
from tests.fakes.captured_logs import captured_logs
from tests.fakes.certificates import Authority
from tests.fakes.services import FakePair
from tests.gateway.rest.conftest import Rest, completion_body, refused, serving_rest

KEY, OTHER = "sk-alice-0123456789", "sk-bob-0123456789ab"
KEYS = f"alice:{KEY},bob:{OTHER}"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
async def guarded(pair: FakePair, tokenizer_folder: Path) -> AsyncIterator[Rest]:
    async with serving_rest(pair, tokenizer_folder, api_keys=KEYS, max_requests_per_key=1) as rest:
        yield rest


@pytest.mark.parametrize(
    ("host", "settings", "status"),
    [
        ("evil.example:8000", {}, 403),
        ("evil.example", {}, 403),
        ("localhost.evil.example", {}, 403),
        ("LOCALHOST", {}, 200),
        ("127.0.0.1:1", {}, 200),
        ("[::1]:8000", {}, 200),
        ("app.localhost:3000", {}, 200),
        ("my.proxy", {"http_hosts": "other, My.Proxy"}, 200),
        ("evil.example", {"http_hosts": "*"}, 200),
    ],
)
async def test_without_keys_a_foreign_name_of_this_machine_is_refused(
    pair: FakePair, tokenizer_folder: Path, host: str, settings: dict[str, str], status: int
) -> None:
    """A page in a browser on this machine may have its own name led here."""
    async with serving_rest(pair, tokenizer_folder, **settings) as rest:
        for path in ("/version", "/v1/models", "/"):
            assert (await rest.http.get(path, headers={"host": host})).status_code == status


async def test_without_a_key_every_api_route_is_closed(guarded: Rest) -> None:
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/of-the-future"),
        ("GET", "/openapi.json"),
    ):
        for headers in ({}, bearer("sk-unknown-0123456789"), {"authorization": KEY}):
            response = await guarded.http.request(method, path, headers=headers)
            error = refused(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert "unknown-0123" not in response.text
    assert guarded.pair.verifier.num_opened == 0
    response = await guarded.http.post("/v1/completions", json=completion_body(), headers=bearer(KEY))
    assert response.status_code == 200


async def test_anthropics_clients_have_another_header_for_the_key(guarded: Rest) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    response = await guarded.http.post("/v1/messages", json=body, headers={"x-api-key": "sk-unknown-0123456789"})
    assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
    assert (await guarded.http.post("/v1/messages", json=body, headers={"x-api-key": KEY})).status_code == 200
    # A key in the other header is the one that counts.
    both = bearer("sk-unknown-0123456789") | {"x-api-key": KEY}
    assert (await guarded.http.post("/v1/messages", json=body, headers=both)).status_code == 401


async def test_a_body_of_someone_unknown_is_not_looked_at(guarded: Rest) -> None:
    for body in (b"not JSON", b"x" * 9_000_000):
        refused(await guarded.http.post("/v1/completions", content=body), 401)
    response = await guarded.http.post("/v1/completions", json=completion_body(), headers=bearer(KEY))
    assert response.status_code == 200


async def test_health_version_and_metrics_are_open(guarded: Rest) -> None:
    for path in ("/health", "/version", "/metrics"):
        assert (await guarded.http.get(path)).status_code == 200


async def test_a_key_at_its_limit_is_told_when_to_come_again(guarded: Rest) -> None:
    guarded.pair.verifier.delay_s = 0.2
    first = asyncio.create_task(
        guarded.http.post("/v1/completions", json=completion_body(max_tokens=20), headers=bearer(KEY))
    )
    async with asyncio.timeout(5):
        while not guarded.pair.verifier.sessions:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    second = await guarded.http.post("/v1/completions", json=completion_body(), headers=bearer(KEY))
    assert refused(second, 429)["code"] == "rate_limit_exceeded"
    assert int(second.headers["retry-after"]) >= 1
    guarded.pair.verifier.delay_s = 0.0
    other = await guarded.http.post("/v1/completions", json=completion_body(), headers=bearer(OTHER))
    assert other.status_code == 200
    assert (await first).status_code == 200


async def test_logs_name_client_and_request_and_nothing_that_was_said(guarded: Rest) -> None:
    body = completion_body(prompt="secretprompt of someone", stop=["neversaid"])
    with captured_logs(level="debug") as logs:
        response = await guarded.http.post(
            "/v1/completions?q=secretquery", json=body, headers=bearer(KEY) | {"x-request-id": "rest-1"}
        )
        await guarded.http.get("/health")
    assert response.status_code == 200
    events = [json.loads(line) for line in logs.getvalue().splitlines()]
    [finished] = [event for event in events if event["event"] == "request_finished"]
    assert (finished["client"], finished["request_id"], finished["reason"]) == ("alice", "rest-1", "length")
    # The same id at all three services, which run in this process.
    of_request = [event for event in events if event.get("request_id") == "rest-1"]
    methods = {event["method"].rpartition("/")[2] for event in of_request if "method" in event}
    assert methods >= {"Verify", "Speculate"}
    [health] = [event for event in events if event.get("path") == "/health"]
    assert health["level"] == "debug"
    for word in ("secretprompt", "neversaid", "secretquery", KEY, "quick", "brown"):
        assert word not in logs.getvalue()


async def test_metrics_count_what_comes_over_http(guarded: Rest) -> None:
    await guarded.http.post("/v1/completions", json=completion_body(), headers=bearer(KEY))
    await guarded.http.post("/v1/completions", json={"prompt": 7, "nonsense": 1}, headers=bearer(KEY))
    await guarded.http.post("/v1/completions", json=completion_body(temperature=-1), headers=bearer(KEY))
    await guarded.http.request("PROPFIND", "/v1/whatever")
    response = await guarded.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "model_name")): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples[("easyspec_http_requests_total", "POST", "/v1/completions", "200")] == 1
    assert samples[("easyspec_http_requests_total", "POST", "/v1/completions", "400")] == 2
    assert samples[("easyspec_http_requests_total", "other", "unrouted", "401")] == 1
    assert samples[("easyspec_refusals_total", "INVALID_REQUEST")] == 2
    assert samples[("easyspec_refusals_total", "UNAUTHENTICATED")] == 1
    assert samples[("vllm:generation_tokens_total",)] == 60


async def test_metrics_can_be_kept_off_this_port(pair: FakePair, tokenizer_folder: Path) -> None:
    async with serving_rest(pair, tokenizer_folder, http_metrics=False) as rest:
        refused(await rest.http.get("/metrics"), 404)


async def test_the_body_limit_is_the_settings(pair: FakePair, tokenizer_folder: Path) -> None:
    async with serving_rest(pair, tokenizer_folder, max_request_bytes=2000) as rest:
        assert refused(await rest.http.post("/v1/completions", json=completion_body(user="x" * 3000)), 413)


async def test_what_is_too_long_is_not_tokenized(pair: FakePair, tokenizer_folder: Path) -> None:
    async with serving_rest(pair, tokenizer_folder, max_prompt_chars=100) as rest:
        for path, body in (
            ("/v1/completions", {"prompt": "x" * 101}),
            ("/tokenize", {"prompt": "x" * 101}),
            ("/tokenize", {"messages": [{"role": "user", "content": "x" * 101}]}),
        ):
            assert "100 characters" in refused(await rest.http.post(path, json=body), 400)["message"]


async def test_a_client_may_set_its_own_deadline(pair: FakePair, tokenizer_folder: Path) -> None:
    pair.verifier.delay_s = 0.1
    async with serving_rest(pair, tokenizer_folder) as rest:
        body = completion_body(max_tokens=1000)
        late = await rest.http.post("/v1/completions", json=body, headers={"x-request-timeout": "0.3"})
        assert refused(late, 504)["code"] == "timeout"
        async with asyncio.timeout(5):
            while not rest.is_idle():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for wrong in ("soon", "0", "-1", "nan"):
            response = await rest.http.post("/v1/completions", json=body, headers={"x-request-timeout": wrong})
            assert refused(response, 400)["param"] == "x-request-timeout"


async def test_https_with_client_certificates_and_renewal(
    pair: FakePair, tokenizer_folder: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    server, client = authority.issue("server"), authority.issue("client")
    fields = {"tls_certificate": server.certificate, "tls_key": server.key, "tls_client_ca": authority.ca}
    context = ssl.create_default_context(cafile=authority.ca)
    nobody = ssl.create_default_context(cafile=authority.ca)
    context.load_cert_chain(client.certificate, client.key)
    async with serving_rest(pair, tokenizer_folder, **fields) as rest:
        url = rest.base_url.replace("http://", "https://")
        async with httpx.AsyncClient(verify=context, base_url=url) as http:
            response = await http.post("/v1/completions", json=completion_body())
            assert response.status_code == 200
        async with httpx.AsyncClient(verify=nobody, base_url=url) as http:
            with pytest.raises(httpx.TransportError):
                await http.get("/health")
        with pytest.raises(httpx.TransportError):
            await rest.http.get("/health")  # plaintext
        authority.issue("server")
        async with httpx.AsyncClient(verify=context, base_url=url) as http:
            assert (await http.get("/health")).status_code == 200


def test_rest_in_plaintext_beyond_this_machine_does_not_start() -> None:
    with pytest.raises(ConfigurationError, match=r"http_address.*tls_certificate"):
        load_settings(GatewaySettings, ["--tokenizer", "t", "--http-address", "0.0.0.0:8000"])
    load_settings(GatewaySettings, ["--tokenizer", "t", "--http-address", "off"])


async def test_web_pages_of_others_may_call_where_they_are_named(pair: FakePair, tokenizer_folder: Path) -> None:
    page = {"origin": "https://page.example"}
    asking = page | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with serving_rest(pair, tokenizer_folder) as rest:
        assert "access-control-allow-origin" not in (await rest.http.get("/v1/models", headers=page)).headers
    async with serving_rest(pair, tokenizer_folder, cors_origins=page["origin"], api_keys=KEYS) as rest:
        allowed = await rest.http.options("/v1/chat/completions", headers=asking)  # browsers ask without a key
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, page["origin"])
        assert (await rest.http.get("/v1/models", headers=page)).status_code == 401
        answer = await rest.http.get("/v1/models", headers=page | bearer(KEY))
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page["origin"])
        other = await rest.http.options("/v1/models", headers=asking | {"origin": "https://other.example"})
        assert other.status_code == 400
