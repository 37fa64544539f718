"""What comes out under a grammar belongs to it, and is the same whatever becomes of the drafter."""

from __future__ import annotations

import asyncio
import json
import random
import re
from typing import Any

import grpc
import jsonschema
import pytest

from easyspec.v1 import generation_pb2, types_pb2
from tests.end_to_end.conftest import Reply, Speculation, Stack, reply
from tests.fakes.grammars import PATTERNS, random_grammar, random_schema
from tests.fakes.servers import eventually

MAX_TOKENS = 120
BUDGET = {"num_levels": 4, "width": 3, "num_nodes": 24}


def asked(grammar: types_pb2.Grammar, rng: random.Random, **fields: Any) -> generation_pb2.GenerateRequest:
    """Under parameters of every kind, none of which may get around the grammar."""
    request = generation_pb2.GenerateRequest(text="def fib", **fields)
    request.stop.max_tokens = MAX_TOKENS
    sampling = types_pb2.SamplingParameters(
        seed=rng.getrandbits(64), temperature=rng.choice([0.0, 0.7, 1.5]), grammar=grammar
    )
    if rng.random() < 0.5:
        sampling.repetition_penalty, sampling.frequency_penalty = rng.uniform(0.8, 1.5), rng.uniform(-0.5, 1.0)
    if rng.random() < 0.5:
        sampling.top_k, sampling.top_p, sampling.min_p = rng.randrange(1, 30), rng.uniform(0.5, 1.0), 0.01
    if rng.random() < 0.5:
        sampling.logit_bias.update({rng.randrange(340): rng.uniform(-100, 100) for _ in range(4)})
    request.sampling.CopyFrom(sampling)
    return request


async def answers(stack: Stack, requests: list[generation_pb2.GenerateRequest]) -> list[Reply]:
    """Each with speculation, after it has said the same without."""
    gate = asyncio.Semaphore(8)

    async def one(request: generation_pb2.GenerateRequest) -> Reply:
        async with gate:
            plain = await stack.ask(request)
            drafted = await stack.ask(request, **BUDGET)
            assert drafted.said == plain.said, request
            return drafted

    return await asyncio.gather(*map(one, requests))


async def test_output_under_a_random_schema_validates(fuzzy_stack: Stack) -> None:
    rng = random.Random(3)
    schemas = [random_schema(rng) for _ in range(40)]
    requests = [asked(types_pb2.Grammar(json_schema=json.dumps(schema)), rng) for schema in schemas]
    num_complete = 0
    replies = await answers(fuzzy_stack, requests)
    for schema, output in zip(schemas, replies, strict=True):
        if output.completion.finish_reason == types_pb2.FINISH_REASON_STOP:
            jsonschema.validate(json.loads(output.text), schema)
            num_complete += 1
        else:
            assert len(output.token_ids) == MAX_TOKENS
    assert num_complete > 30
    assert sum(output.num_accepted for output in replies) > 100


async def test_output_under_a_regex_matches_it_whole(fuzzy_stack: Stack) -> None:
    rng = random.Random(4)
    requests = [asked(types_pb2.Grammar(regex=pattern), rng) for pattern in PATTERNS for _ in range(3)]
    for request, output in zip(requests, await answers(fuzzy_stack, requests), strict=True):
        assert output.completion.finish_reason == types_pb2.FINISH_REASON_STOP
        assert re.fullmatch(request.sampling.grammar.regex, output.text), request


@pytest.mark.parametrize("num_rounds", [1, 2, 4])
async def test_a_drafter_that_dies_and_comes_back_changes_nothing(stack: Stack, num_rounds: int) -> None:
    """Text, tokens and log-probabilities, with grammars and without; the session opened again finds its place."""
    rng = random.Random(num_rounds)
    requests = [
        asked(types_pb2.Grammar(regex="((range|return|print) [a-z]{1,3}; ){6}"), rng, num_top_logprobs=3),
        asked(types_pb2.Grammar(lark='start: ("yes" | "no" | /[0-9]{2}/ ", "){12} "."'), rng, num_top_logprobs=0),
    ]
    free = asked(types_pb2.Grammar(regex="x"), rng, num_top_logprobs=1)
    free.sampling.ClearField("grammar")
    free.stop.max_tokens = 40
    for request in [*requests, free]:
        plain = await stack.ask(request)
        output = await broken_off(stack, request, num_rounds)
        assert output.said == plain.said
        assert output.completion.speculation.num_drafter_failures > 0


async def broken_off(stack: Stack, request: generation_pb2.GenerateRequest, num_rounds: int) -> Reply:
    """The reply, the drafter being killed after so many rounds and started again some rounds later."""
    copy = generation_pb2.GenerateRequest()
    copy.CopyFrom(request)
    copy.speculation.mode = Speculation.MODE_ON
    copy.speculation.budget.MergeFrom(types_pb2.TreeBudget(num_levels=2, width=2, num_nodes=6))
    chunks = []
    await stack.until_drafter_is_ready()
    async for chunk in stack.stub.Generate(copy, timeout=60):
        chunks.append(chunk)
        if len(chunks) == num_rounds:
            await stack.drafter.kill()
        if len(chunks) == num_rounds + 3:
            await stack.drafter.start()
    if len(chunks) < num_rounds + 3:
        await stack.drafter.start()
    await eventually(lambda: stack.drafter_engine.kv_usage().num_sessions == 0, within_s=5.0)
    return reply(chunks)


@pytest.mark.parametrize("kind", ["json_schema", "regex", "lark"])
async def test_a_grammar_that_is_wrong_is_its_senders_error(stack: Stack, kind: str) -> None:
    """Named, and without a trace for others, who go on meanwhile."""
    rng = random.Random(5)
    good = asked(types_pb2.Grammar(regex="(range|return){3}"), rng)
    expected = await stack.ask(good, **BUDGET)

    async def bad() -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.ask(asked(types_pb2.Grammar(**{kind: "{((["}), rng), **BUDGET)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"sampling.grammar.{kind} is " in (caught.value.details() or "")

    replies = await asyncio.gather(*(stack.ask(good, **BUDGET) for _ in range(3)), *(bad() for _ in range(3)))
    assert [output.said for output in replies[:3]] == [expected.said] * 3
    await eventually(lambda: stack.drafter_engine.kv_usage().num_sessions == 0, within_s=5.0)


def test_random_grammars_are_of_every_kind() -> None:
    rng = random.Random(0)
    assert len({random_grammar(rng).kind for _ in range(50)}) == 3
