"""A stop at every offset of an accepted block, and across block borders: nothing leaks, with or without a drafter."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from easyspec.v1 import generation_pb2, types_pb2
from tests.end_to_end.conftest import Reply, Stack

EOS = 0
NUM_TOKENS = 19
BUDGETS = ({"num_levels": 5, "width": 2, "num_nodes": 40}, {"num_levels": 2, "width": 2, "num_nodes": 16})
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "seed": 1},
    "sampled": {"temperature": 0.7, "seed": 7},
    "structured": {"temperature": 1.0, "seed": 5, "top_p": 0.9, "grammar": types_pb2.Grammar(regex="[a-z ]{40,}")},
}


def asked(sampling: dict[str, Any], max_tokens: int = NUM_TOKENS, **fields: Any) -> generation_pb2.GenerateRequest:
    request = generation_pb2.GenerateRequest(text="def fib", num_top_logprobs=2, **fields)
    request.sampling.MergeFrom(types_pb2.SamplingParameters(**sampling))
    request.stop.max_tokens = max_tokens
    request.stop.ignore_eos = True
    return request


def with_stops(request: generation_pb2.GenerateRequest, *stops: str | int) -> generation_pb2.GenerateRequest:
    copy = generation_pb2.GenerateRequest()
    copy.CopyFrom(request)
    copy.stop_strings.extend(stop for stop in stops if isinstance(stop, str))
    copy.stop.stop_token_ids.extend(stop for stop in stops if isinstance(stop, int))
    return copy


def offsets_in_blocks(reply: Reply) -> set[tuple[int, int]]:
    """(offset, size) of every token in its block."""
    return {(offset, len(block)) for block in reply.blocks for offset in range(len(block))}


async def whole_replies(stack: Stack, sampling: dict[str, Any]) -> Reply:
    """The reply without a stop; blocks of all sizes are there when it is drafted."""
    plain = await stack.ask(asked(sampling))
    assert len(plain.token_ids) == NUM_TOKENS
    for budget in BUDGETS:
        drafted = await stack.ask(asked(sampling), **budget)
        assert drafted.said == plain.said
        most = budget["num_levels"] + 1
        assert {(offset, most) for offset in range(most)} <= offsets_in_blocks(drafted)
    return plain


async def check(stack: Stack, requests: Sequence[generation_pb2.GenerateRequest], expected: Sequence[Any]) -> None:
    """What every request says plainly and with each budget; several at a time."""
    gate = asyncio.Semaphore(8)

    async def one(request: generation_pb2.GenerateRequest, said: Any) -> None:
        async with gate:
            for budget in ({}, *BUDGETS):
                assert (await stack.ask(request, **budget)).said == said, (budget, request)

    await asyncio.gather(*(one(request, said) for request, said in zip(requests, expected, strict=True)))


def cut(whole: Reply, text: str, num_tokens: int, ending: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is said if `num_tokens` tokens are: never a log-probability more."""
    return text, whole.token_ids[:num_tokens], whole.logprobs[:num_tokens], ending, num_tokens


@pytest.fixture
def backend(base_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(base_folder / "tokenizer.json"))


def decoded(backend: Tokenizer, token_ids: Sequence[int]) -> str:
    return str(backend.decode(list(token_ids), skip_special_tokens=True))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
async def test_a_stop_token_at_every_offset(stack: Stack, backend: Tokenizer, sampling: dict[str, Any]) -> None:
    whole = await whole_replies(stack, sampling)
    requests, expected = [], []
    for offset, token_id in enumerate(whole.token_ids):
        length = whole.token_ids.index(token_id) + 1
        said = cut(
            whole,
            decoded(backend, whole.token_ids[: length - 1]),
            length,
            (types_pb2.FINISH_REASON_STOP, token_id, ""),
        )
        shown = with_stops(asked(sampling, includes_stop=True), token_id)
        requests.append(shown)
        expected.append((decoded(backend, whole.token_ids[:length]), *said[1:]))
        # Of stop and length on the same token the stop wins.
        requests += [with_stops(asked(sampling), token_id), with_stops(asked(sampling, length), token_id)]
        expected += [said, said]
        requests.append(asked(sampling, offset + 1))
        text = decoded(backend, whole.token_ids[: offset + 1])
        expected.append(cut(whole, text, offset + 1, (types_pb2.FINISH_REASON_LENGTH, 0, "")))
    await check(stack, requests, expected)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
async def test_a_stop_string_at_every_offset(stack: Stack, backend: Tokenizer, sampling: dict[str, Any]) -> None:
    """Of one to several characters, within a token, over tokens, and over blocks."""
    whole = await whole_replies(stack, sampling)
    requests, expected = [], []
    for start in range(len(whole.text)):
        stop = whole.text[start : start + (1, 2, 5)[start % 3]]
        if "\ufffd" in stop:
            continue
        text = whole.text[: whole.text.index(stop)]
        length = next(n for n in range(NUM_TOKENS + 1) if stop in decoded(backend, whole.token_ids[:n]))
        said = cut(whole, text, length, (types_pb2.FINISH_REASON_STOP, 0, stop))
        requests.append(with_stops(asked(sampling, length if start % 2 else NUM_TOKENS), stop))  # it beats the length
        expected.append(said)
    assert len(requests) > 10
    await check(stack, requests, expected)


async def test_an_end_of_sequence_at_every_offset(stack: Stack, backend: Tokenizer) -> None:
    """Where a grammar lets it come, and where the model says so by itself."""
    for length in range(1, 12):
        request = asked(SAMPLINGS["sampled"], 40)
        request.sampling.grammar.regex = f"[a-z ]{{{length}}}"
        plain = await stack.ask(request)
        assert plain.token_ids[-1] == plain.completion.token_id == EOS
        assert len(plain.text) == length
        assert len(plain.logprobs) == len(plain.token_ids)
        for budget in BUDGETS:
            assert (await stack.ask(request, **budget)).said == plain.said
    ends: set[int] = set()
    for seed in range(16):
        request = asked(SAMPLINGS["sampled"] | {"seed": seed, "logit_bias": {EOS: 4.0}}, 40)
        endless = await stack.ask(request)
        request.stop.ignore_eos = False
        if EOS not in endless.token_ids:
            continue
        length = endless.token_ids.index(EOS) + 1
        ending = (types_pb2.FINISH_REASON_STOP, EOS, "")
        said = cut(endless, decoded(backend, endless.token_ids[:length]), length, ending)
        drafted = await stack.ask(request, **BUDGETS[0])
        assert drafted.said == (await stack.ask(request)).said == said
        ends.add(len(drafted.blocks[-1]))
    assert len(ends) >= 4  # blocks cut at so many different offsets


async def test_an_echoed_prompt_comes_first_with_its_own_log_probabilities(stack: Stack, backend: Tokenizer) -> None:
    whole = await stack.ask(asked(SAMPLINGS["sampled"]))
    prompt = backend.encode("def fib").ids
    echoing = asked(SAMPLINGS["sampled"], echo=True)
    for budget in ({}, *BUDGETS):
        reply = await stack.ask(echoing, **budget)
        assert reply.blocks[0] == tuple(prompt)
        assert reply.text == "def fib" + whole.text
        assert reply.token_ids == (*prompt, *whole.token_ids)
        assert reply.logprobs[0] == (0.0, (), ())  # nothing precedes it
        assert all(entry[0] < 0.0 and len(entry[1]) == 2 for entry in reply.logprobs[1:])
        assert reply.logprobs[len(prompt) :] == whole.logprobs
        assert reply.completion.usage.num_output_tokens == NUM_TOKENS
    echoing.ClearField("num_top_logprobs")
    assert (await stack.ask(echoing, **BUDGETS[0])).logprobs == ()
