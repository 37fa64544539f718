"""Tools over gRPC: the same as over REST, message by message."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from easyspec.rpc.channels import open_channel
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.service.config import GatewaySettings
from gateway.service.server import GatewayServer
from gateway.text.conversation import ChatTurn, Conversation, ToolDefinition, Tools
from gateway.text.tokenizer import Tokenizer
from models.recipe.chat import CHAT_TEMPLATE
from tests.fakes.services import FakePair, running
from tests.fakes.tiny_tokenizer import write_tokenizer

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOL = generation_pb2.ToolDefinition(name="weather", parameters_json_schema='{"type": "object"}')
Choice = generation_pb2.ToolChoice


@pytest.fixture
async def stub(pair: FakePair, tmp_path: Path) -> AsyncIterator[Any]:
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    settings = GatewaySettings(
        address="127.0.0.1:0",
        tokenizer=folder,
        verifier_address=pair.verifier_service.address,
        drafter_address=pair.drafter_service.address,
    )
    conversation = Conversation(
        (ChatTurn("user", "hi"),), Tools((ToolDefinition("weather", "", '{"type": "object"}'),))
    )
    tokenizer = Tokenizer.load(folder)
    said = (5,) * len(tokenizer.prompt_of(conversation).token_ids) + tokenizer.encode(f"So: {CALL}") + (0,) * 300
    for engine in (pair.verifier, pair.drafter):
        engine.language = replace(engine.language, token_ids=said)
    async with running(GatewayServer(settings)) as service, open_channel(service.address) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


def request_of(**chat: Any) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest(chat=generation_pb2.ChatPrompt(**chat))
    request.chat.messages.add(role="user", content="hi")
    request.sampling.temperature = 0
    request.stop.max_tokens = 300
    return request


async def test_calls_come_as_deltas(stub: Any) -> None:
    responses = [r async for r in stub.Generate(request_of(tools=[TOOL]), timeout=20)]
    assert "".join(r.text for r in responses) == "So:"
    deltas = [delta for r in responses for delta in r.tool_calls]
    assert (deltas[0].index, deltas[0].name) == (0, "weather")
    assert deltas[0].id.startswith("call_")
    assert not any(delta.id or delta.name for delta in deltas[1:])
    assert "".join(delta.arguments for delta in deltas) == '{"city": "Paris"}'
    assert responses[-1].completion.finish_reason == types_pb2.FINISH_REASON_TOOL_CALLS


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        ({"tool_choice": Choice(mode=Choice.MODE_REQUIRED)}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": Choice(mode=Choice.MODE_NAMED, name="nuke")}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": Choice(mode=9)}, "tool_choice.mode"),  # type: ignore[arg-type]
        ({"tools": [generation_pb2.ToolDefinition(name="f", parameters_json_schema="[")]}, "tools[0].parameters"),
        ({"tools": [generation_pb2.ToolDefinition()]}, "tools[0].name"),
        (
            {"tools": [generation_pb2.ToolDefinition(name="f", parameters_json_schema='{"a":' * 900 + "1" + "}" * 900)]}
            | {"tool_choice": Choice(mode=Choice.MODE_REQUIRED)},
            "tools",
        ),
    ],
)
async def test_what_is_not_allowed_is_named(stub: Any, chat: dict[str, Any], field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=field.replace("[", r"\[")) as caught:
        async for _ in stub.Generate(request_of(**chat), timeout=20):
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
