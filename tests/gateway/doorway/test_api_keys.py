"""API keys: parsing, lookup, reloading, and at the port of a real gateway."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from easyspec.errors import CapacityError, ConfigurationError, UnauthenticatedError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.doorway.api_keys import ApiKeys, ClientLimiter, name_of, parse_keys
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.captured_logs import captured_logs
from tests.fakes.services import TOY_TEXT, FakePair, ToyLanguage, running, running_pair

KEY, OTHER = "sk-alice-0123456789", "sk-bob-0123456789ab"
HASHED = hashlib.sha256(OTHER.encode()).hexdigest()


def test_keys_stand_in_clear_or_as_hashes_one_a_line() -> None:
    keys = parse_keys(f"# clients\n\nalice:{KEY}\n  bob:sha256:{HASHED}  \n", "file")
    assert len(keys) == 2
    assert (name_of(keys, KEY), name_of(keys, OTHER)) == ("alice", "bob")
    for wrong in ("", KEY[:-1], f"{KEY}x", KEY.upper(), f"sha256:{HASHED}", HASHED):
        assert name_of(keys, wrong) is None


def test_commas_separate_too_and_a_name_may_have_two_keys() -> None:
    keys = parse_keys(f"alice:{KEY},alice:{OTHER}", "api_keys")
    assert (name_of(keys, KEY), name_of(keys, OTHER)) == ("alice", "alice")


def test_every_key_is_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(known: bytes, presented: bytes) -> bool:
        compared.append(known)
        return known == presented

    monkeypatch.setattr("gateway.doorway.api_keys.hmac.compare_digest", compare)
    keys = parse_keys(f"alice:{KEY},bob:{OTHER}", "api_keys")
    for presented in (KEY, OTHER, "sk-unknown"):
        compared.clear()
        name_of(keys, presented)
        assert len(compared) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("secret-without-a-name-0123", ["line 1", "no colon"]),
        ("\nal ice:secret-0123456789ab", ["line 2", "name"]),
        ("alice:secret", ["alice", "at least 16"]),
        ("alice:secret with blanks 0123456789", ["alice", "not fit"]),
        ("alice:sha256:secret", ["alice", "malformed hash"]),
        (f"alice:{KEY}\nbob:{KEY}", ["'alice'", "'bob'", "same key"]),
    ],
)
def test_what_is_wrong_with_a_key_is_said_without_showing_it(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_keys(text, "keys.txt")
    for word in ("keys.txt", *words):
        assert word in str(caught.value)
    assert "secret" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_the_header_must_be_a_known_bearer_token(tmp_path: Path) -> None:
    keys = ApiKeys(None, f"alice:{KEY}")
    assert keys.authenticate(f"Bearer {KEY}") == "alice"
    assert keys.authenticate(f"bearer  {KEY}") == "alice"
    for header in (None, "", KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY} x", "Bearer " + "x" * 5000):
        with pytest.raises(UnauthenticatedError) as caught:
            keys.authenticate(header)
        assert KEY not in str(caught.value)


def test_no_key_at_all_does_not_start(tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n")
    for file, inline in ((empty, None), (tmp_path / "missing", None), (None, " ")):
        with pytest.raises(ConfigurationError):
            ApiKeys(file, inline)


async def test_a_changed_file_is_read_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:{KEY}\n")
    keys = ApiKeys(file, None)
    watch = asyncio.create_task(keys.watch(0.01))
    try:
        replace(file, f"bob:sha256:{HASHED}\n")
        await until_known(keys, OTHER)
        with pytest.raises(UnauthenticatedError):
            keys.authenticate(f"Bearer {KEY}")
        file.unlink()
        await asyncio.sleep(0.05)
        assert keys.authenticate(f"Bearer {OTHER}") == "bob"
        replace(file, "broken\n")
        await asyncio.sleep(0.05)
        assert keys.authenticate(f"Bearer {OTHER}") == "bob"
        replace(file, f"alice:{KEY}\n")
        await until_known(keys, KEY)
    finally:
        watch.cancel()


def replace(file: Path, text: str) -> None:
    """As secret stores do it: a new file in the place of the old one."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, file)


async def until_known(keys: ApiKeys, key: str) -> None:
    async with asyncio.timeout(5):
        while True:
            try:
                keys.authenticate(f"Bearer {key}")
                return
            except UnauthenticatedError:
                await asyncio.sleep(0.01)


def test_a_client_may_run_so_many_requests_and_others_are_not_touched() -> None:
    limiter = ClientLimiter(2)
    with limiter.place("alice"), limiter.place("alice"):
        with pytest.raises(CapacityError) as caught, limiter.place("alice"):
            pass
        assert caught.value.retry_after_s > 0
        with limiter.place("bob"):
            pass
    with limiter.place("alice"):
        pass


# --- at the port ------------------------------------------------------------------------------------------------


@pytest.fixture
async def pair(tokenizer: Tokenizer) -> AsyncIterator[FakePair]:
    token_ids = tokenizer.encode(TOY_TEXT)
    async with running_pair(ToyLanguage(token_ids, 352, tokenizer.fingerprint)) as pair:
        yield pair


@asynccontextmanager
async def gateway(pair: FakePair, folder: Path, **fields: Any) -> AsyncIterator[tuple[GatewayServer, grpc.aio.Channel]]:
    settings = GatewaySettings(
        address="127.0.0.1:0",
        tokenizer=folder,
        verifier_address=pair.verifier_service.address,
        drafter_address=pair.drafter_service.address,
        **fields,
    )
    server = GatewayServer(settings)
    async with running(server) as service, open_channel(service.address) as channel:
        yield server, channel


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def generate(channel: grpc.aio.Channel, key: str | None = None, max_tokens: int = 8) -> int:
    request = generation_pb2.GenerateRequest(text="hello", stop=types_pb2.StopConditions(max_tokens=max_tokens))
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    call = stub.Generate(request, timeout=20, metadata=bearer(key) if key is not None else None)
    return sum([len(chunk.token_ids) async for chunk in call])


async def refusal(channel: grpc.aio.Channel, key: str | None) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(channel, key)
    return caught.value


async def test_without_a_known_key_no_rpc_of_the_gateway_answers(pair: FakePair, tokenizer_folder: Path) -> None:
    async with gateway(pair, tokenizer_folder, api_keys=f"alice:{KEY}") as (_, channel):
        assert await generate(channel, KEY) == 8
        opened = pair.verifier.num_opened
        for key in (None, "sk-unknown-0123456789"):
            error = await refusal(channel, key)
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert isinstance(error_from_rpc(error), UnauthenticatedError)
            assert "unknown-0123" not in str(error)
        # Whatever RPC is added later is behind the same door.
        for method in generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].methods:
            path = f"/{method.containing_service.full_name}/{method.name}"
            multi = channel.unary_stream(path) if method.server_streaming else channel.unary_unary(path)
            assert await multi(b"", timeout=5).code() is grpc.StatusCode.UNAUTHENTICATED
        assert pair.verifier.num_opened == opened


async def test_health_and_reflection_need_no_key(pair: FakePair, tokenizer_folder: Path) -> None:
    async with gateway(pair, tokenizer_folder, api_keys=f"alice:{KEY}") as (server, channel):
        health = health_pb2_grpc.HealthStub(channel)
        response = await health.Check(health_pb2.HealthCheckRequest(service=server.service_name), timeout=5)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        assert [r async for r in stub.ServerReflectionInfo(iter([request]), timeout=5)]


async def test_a_key_is_held_to_its_requests_and_gets_a_hint(pair: FakePair, tokenizer_folder: Path) -> None:
    pair.verifier.delay_s = 0.3
    keys = f"alice:{KEY},bob:{OTHER}"
    async with gateway(pair, tokenizer_folder, api_keys=keys, max_requests_per_key=1) as (_, channel):
        first = asyncio.create_task(generate(channel, KEY, 4))
        async with asyncio.timeout(5):
            while not pair.verifier.sessions:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        error = error_from_rpc(await refusal(channel, KEY))
        assert isinstance(error, CapacityError)
        assert error.retry_after_s > 0
        pair.verifier.delay_s = 0.0
        assert await generate(channel, OTHER, 4) == 4
        assert await first == 4
        assert await generate(channel, KEY, 4) == 4


async def test_new_keys_are_taken_up_without_ending_what_runs(
    pair: FakePair, tokenizer_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice:{KEY}\n")
    pair.verifier.delay_s = 0.05
    async with gateway(pair, tokenizer_folder, api_keys_file=file) as (server, channel):
        running_request = asyncio.create_task(generate(channel, KEY, 30))
        async with asyncio.timeout(5):
            while not pair.verifier.sessions:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        file.write_text(f"bob:{OTHER}\n")
        server.reload()  # what SIGHUP calls
        assert (await refusal(channel, KEY)).code() is grpc.StatusCode.UNAUTHENTICATED
        assert await generate(channel, OTHER, 4) == 4
        assert await running_request == 30


async def test_logs_name_the_client_and_never_its_key(pair: FakePair, tokenizer_folder: Path) -> None:
    with captured_logs() as stream:
        async with gateway(pair, tokenizer_folder, api_keys=f"alice:{KEY}") as (_, channel):
            await generate(channel, KEY)
            await refusal(channel, OTHER)
    assert '"client": "alice"' in stream.getvalue()
    assert "sk-" not in stream.getvalue()
    assert "0123456789" not in stream.getvalue()
