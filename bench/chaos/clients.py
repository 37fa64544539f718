"""The services as clients of a chaos run see them: what is asked for, and what comes."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc

from bench.chaos.answers import Answer, Verdict
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc, has_retry_hint
from easyspec.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
)

_TIMEOUT_S = 240.0
_PROBE_TIMEOUT_S = 2.0
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer", "maximum": 999}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
_LONG = "\n".join(f"def f{number}(x):\n    return x + {number}" for number in range(60))
_Mode = generation_pb2.SpeculationParameters


@dataclass(frozen=True)
class Held:
    """Open sessions, and slots of KV memory that they hold."""

    num_sessions: int
    num_slots: int


@dataclass(frozen=True)
class Kind:
    """A kind of request; a slow reader waits after each chunk, and one that gives up cancels after some."""

    name: str
    request: generation_pb2.GenerateRequest
    pause_s: float = 0.0
    gives_up_after: int | None = None


def kinds(num_tokens: int) -> list[Kind]:
    """One of each kind, `num_tokens` long where nothing else ends it."""

    def asked(text: str = "def fibonacci(n):", temperature: float = 0.0, **fields: Any) -> Any:
        request = generation_pb2.GenerateRequest(text=text, **fields)
        request.sampling.temperature, request.sampling.seed = temperature, 7
        request.stop.max_tokens, request.stop.ignore_eos = num_tokens, True
        request.speculation.mode = _Mode.MODE_ON
        return request

    grammar, tools = asked(temperature=0.8), asked(temperature=0.8)
    grammar.sampling.grammar.CopyFrom(types_pb2.Grammar(json_schema=json.dumps(_SCHEMA)))
    tools.chat.messages.add(role="user", content="How many are there?")
    tools.chat.tools.add(name="count", parameters_json_schema=json.dumps(_SCHEMA))
    tools.chat.tool_choice.mode = generation_pb2.ToolChoice.MODE_REQUIRED
    return [
        Kind("greedy", asked()),
        Kind("sampled", asked("class Stack:", 0.8)),
        Kind("plain", asked("import os", 0.8, speculation={"mode": _Mode.MODE_OFF})),
        Kind("n = 2", asked(temperature=0.9, num_choices=2)),
        Kind("stops", asked(temperature=0.7, stop_strings=["return", "zzz"])),
        Kind("grammar", grammar),
        Kind("tools", tools),
        Kind("long prompt", asked(_LONG, 0.5)),
        Kind("slow reader", asked("for i in", 0.8), pause_s=0.3),
        Kind("cancels", asked("while True:", 0.8), gives_up_after=4),
    ]


async def ask(stub: Any, kind: Kind, request_id: str = "") -> Answer:
    """The answer to one request; its error is part of it."""
    answer = Answer()
    call = stub.Generate(kind.request, timeout=_TIMEOUT_S, metadata=(("x-request-id", request_id),))
    num_chunks, last_s = 0, time.monotonic()
    try:
        async for response in call:
            answer.longest_pause_s = max(answer.longest_pause_s, time.monotonic() - last_s)
            answer.token_ids[response.choice_index] += response.token_ids
            if response.HasField("completion"):
                done = response.completion
                ending = done.finish_reason, done.stop_string, done.usage.num_output_tokens
                answer.endings[response.choice_index] = ending
            num_chunks += 1
            if num_chunks == kind.gives_up_after:
                break
            await asyncio.sleep(kind.pause_s)
            last_s = time.monotonic()
    except grpc.aio.AioRpcError as error:
        answer.error, answer.says_when = error_from_rpc(error), has_retry_hint(error)
    finally:
        call.cancel()
    answer.longest_pause_s = max(answer.longest_pause_s, time.monotonic() - last_s - kind.pause_s)
    return answer


class Asked(NamedTuple):
    kind: Kind
    answer: Answer
    verdict: Verdict
    request_id: str


async def answers(
    connect: Callable[[], AbstractAsyncContextManager[Any]],
    wanted: Sequence[Kind],
    whole: Mapping[str, Answer],
    name: str,
    is_over: Callable[[], bool],
) -> AsyncIterator[Asked]:
    """One request after the other, drawn by the client's `name`, each asked of what `connect` gives."""
    choose = random.Random(name)
    for number in itertools.count():
        if is_over():
            return
        kind, request_id = choose.choice(wanted), f"{name}-{number}"
        async with connect() as stub:
            answer = await ask(stub, kind, request_id)
        yield Asked(kind, answer, answer.compared_with(whole[kind.name]), request_id)


async def undisturbed(stub: Any, wanted: Sequence[Kind]) -> Mapping[str, Answer]:
    """The whole answer of each kind, asked one at a time, also of clients that would give up."""
    answers = {}
    for kind in wanted:
        answer = answers[kind.name] = await ask(stub, Kind(kind.name, kind.request))
        if answer.error is not None:
            raise answer.error
    return answers


@asynccontextmanager
async def gateway_at(address: str) -> AsyncIterator[Any]:
    """What `ask` needs of the gateway."""
    async with open_channel(address) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


async def held_memory(address: str, *, is_verifier: bool) -> Held | None:
    """What sessions hold of a verifier or drafter; None if it does not answer."""
    async with open_channel(address) as channel:
        verifier: Any = verifier_pb2_grpc.VerifierServiceStub(channel)
        drafter: Any = drafter_pb2_grpc.DrafterServiceStub(channel)
        try:
            if is_verifier:
                asked = verifier.GetVerifierInfo(verifier_pb2.GetVerifierInfoRequest(), timeout=_PROBE_TIMEOUT_S)
            else:
                asked = drafter.GetDrafterInfo(drafter_pb2.GetDrafterInfoRequest(), timeout=_PROBE_TIMEOUT_S)
            kv = (await asked).kv
            return Held(kv.num_sessions, kv.num_used_slots)
        except grpc.aio.AioRpcError:
            return None
