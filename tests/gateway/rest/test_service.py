"""Life cycle of the REST side: open, refused while loading, served, drained, closed."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import httpx
import pytest

from easyspec import __version__
from easyspec.errors import ConfigurationError
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from tests.fakes.servers import eventually
from tests.fakes.services import FakePair
from tests.gateway.rest.conftest import Rest, answered, completion_body, events_of, refused


async def test_health_version_and_models(rest: Rest) -> None:
    assert answered(await rest.http.get("/health")) == {"status": "ok", "verifier": "ready", "drafter": "ready"}
    assert answered(await rest.http.get("/version")) == {"version": __version__}
    models = answered(await rest.http.get("/v1/models"))
    assert models["object"] == "list"
    (card,) = models["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("toy-base", "model", 2048)
    assert answered(await rest.http.get("/v1/models/toy-base")) == card
    assert refused(await rest.http.get("/v1/models/org/gpt-9"), 404)["code"] == "model_not_found"


async def test_until_the_verifier_answers_requests_are_refused(pair: FakePair, tokenizer_folder: Path) -> None:
    await pair.verifier_service.kill()
    settings = GatewaySettings(
        tokenizer=tokenizer_folder,
        http_address="127.0.0.1:0",
        verifier_address=pair.verifier_service.address,
        retry_first_ms=10,
    )
    server = GatewayServer(settings)
    starting = asyncio.create_task(server.start())
    async with asyncio.timeout(5):
        while server.http_port is None:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http_port}", trust_env=False) as http:
        for path in ("/health", "/v1/models"):
            error = refused(await http.get(path), 503)
            assert (error["type"], error["code"]) == ("server_error", "service_unavailable")
            assert "loading" in error["message"]
        assert (await http.get("/version")).status_code == 200
        await pair.verifier_service.start()
        await asyncio.wait_for(starting, 5)
        assert (await http.get("/health")).status_code == 200
    await server.drain(0)
    await server.stop()


async def test_draining_lets_a_stream_finish_and_refuses_new_requests(rest: Rest) -> None:
    rest.pair.verifier.delay_s = 0.02
    async with rest.http.stream("POST", "/v1/completions", json=completion_body(stream=True)) as response:
        parts = response.aiter_text()
        text = await anext(parts)
        draining = asyncio.create_task(rest.gateway.drain(10))
        await asyncio.sleep(0.01)
        assert "draining" in refused(await rest.http.get("/health"), 503)["message"]
        refused(await rest.http.post("/v1/completions", json=completion_body()), 503)
        assert not draining.done()
        text += "".join([part async for part in parts])
    assert events_of(text)[-1]["choices"][0]["finish_reason"] == "length"
    await asyncio.wait_for(draining, 5)


async def test_a_stream_that_outlives_the_grace_is_told_so(rest: Rest) -> None:
    rest.pair.verifier.delay_s = 0.05
    body = completion_body(stream=True, max_tokens=1000)
    async with rest.http.stream("POST", "/v1/completions", json=body) as response:
        parts = response.aiter_text()
        text = await anext(parts)
        await asyncio.wait_for(rest.gateway.drain(0.05), 5)
        text += "".join([part async for part in parts])
    error = events_of(text)[-1]["error"]
    assert (error["type"], error["code"]) == ("server_error", "service_unavailable")
    await eventually(rest.is_idle)


async def test_a_whole_answer_that_outlives_the_grace_is_refused(rest: Rest) -> None:
    rest.pair.verifier.delay_s = 0.05
    waiting = asyncio.create_task(rest.http.post("/v1/completions", json=completion_body(max_tokens=1000)))
    await eventually(lambda: bool(rest.pair.verifier.sessions))
    await asyncio.wait_for(rest.gateway.drain(0.05), 5)
    assert "draining" in refused(await waiting, 503)["message"]
    await eventually(rest.is_idle)


async def test_a_port_that_is_taken_is_a_start_up_error(tokenizer_folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        server = GatewayServer(GatewaySettings(tokenizer=tokenizer_folder, http_address=address))
        with pytest.raises(ConfigurationError, match=f"http_address is '{address}': cannot listen there: .*in use"):
            await server.start()
        await server.stop()


@pytest.mark.parametrize("address", ["8000", "127.0.0.1:70000", "on"])
def test_an_address_that_is_none_is_refused(tokenizer_folder: Path, address: str) -> None:
    with pytest.raises(ValueError, match="http_address"):
        GatewaySettings(tokenizer=tokenizer_folder, http_address=address)
