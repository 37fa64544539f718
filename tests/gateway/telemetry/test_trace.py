"""Traces of rounds, from a real gateway with fakes behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from easyspec.rpc.channels import open_channel
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.tokenizer import Tokenizer
from tests.fakes.services import TOY_TEXT, FakePair, ToyLanguage, running, running_pair

Mode = generation_pb2.SpeculationParameters


@pytest.fixture
async def pair(tokenizer: Tokenizer) -> AsyncIterator[FakePair]:
    language = ToyLanguage(tokenizer.encode(TOY_TEXT), vocab_size=352, fingerprint=tokenizer.fingerprint)
    async with running_pair(language) as pair:
        yield pair


@pytest.fixture
async def gateway(pair: FakePair, tokenizer: Tokenizer, tokenizer_folder: object) -> AsyncIterator[str]:
    settings = GatewaySettings(
        address="127.0.0.1:0",
        tokenizer=tokenizer_folder,
        verifier_address=pair.verifier_service.address,
        drafter_address=pair.drafter_service.address,
    )
    async with running(GatewayServer(settings)) as service:
        yield service.address


async def generate(
    address: str, trace: bool, mode: int = 0, stop_strings: tuple[str, ...] = ()
) -> list[generation_pb2.GenerateResponse]:
    request = generation_pb2.GenerateRequest(
        text="def f(n):",
        sampling=types_pb2.SamplingParameters(temperature=0.0),
        stop=types_pb2.StopConditions(max_tokens=60),
        stop_strings=stop_strings,
        speculation=generation_pb2.SpeculationParameters(mode=mode, trace=trace),  # type: ignore[arg-type]
    )
    async with open_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        return [chunk async for chunk in stub.Generate(request, timeout=20)]


async def test_a_trace_tells_the_tree_and_the_accepted_rows(gateway: str, pair: FakePair, tokenizer: Tokenizer) -> None:
    chunks = await generate(gateway, trace=True)
    assert len(chunks) == len(pair.verifier.trees) > 4
    for chunk, tree in zip(chunks, pair.verifier.trees, strict=True):
        assert tuple(chunk.trace.draft_tree.token_ids) == tree.token_ids
        assert tuple(chunk.trace.draft_tree.parent_rows) == tree.parent_rows
        assert chunk.trace.draft_token_texts == [tokenizer.token_text(token_id) for token_id in tree.token_ids]
        rows = list(chunk.trace.accepted_rows)
        assert len(rows) == chunk.num_accepted
        # The accepted rows are a path from the root, and carry the accepted tokens.
        assert [tree.token_ids[row - 1] for row in rows] == list(chunk.token_ids[: chunk.num_accepted])
        assert [tree.parent_rows[row - 1] for row in rows] == [0, *rows][: len(rows)]
    assert sum(chunk.num_accepted for chunk in chunks) > 20


async def test_a_stop_string_cuts_the_accepted_rows_too(gateway: str, pair: FakePair) -> None:
    pair.drafter.wrong_every = 10_000
    last = (await generate(gateway, trace=True, mode=Mode.MODE_ON, stop_strings=("ST",)))[-1]
    assert last.completion.stop_string == "ST"
    assert len(last.trace.accepted_rows) == last.num_accepted < pair.verifier.trees[-1].num_levels


async def test_plain_decoding_has_an_empty_tree_and_token_texts(gateway: str) -> None:
    chunks = await generate(gateway, trace=True, mode=Mode.MODE_OFF)
    assert all(chunk.HasField("trace") and not chunk.trace.draft_tree.token_ids for chunk in chunks)
    assert all(len(chunk.token_texts) == len(chunk.token_ids) for chunk in chunks)


async def test_no_trace_unless_asked(gateway: str) -> None:
    assert not any(chunk.HasField("trace") for chunk in await generate(gateway, trace=False))
