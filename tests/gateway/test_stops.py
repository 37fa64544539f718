"""Where a completion ends, and that no chunk ends in half a character."""

from __future__ import annotations

import random
from typing import Any

import pytest

from easyspec.v1 import types_pb2
from gateway.text.tokenizer import Tokenizer
from tests.gateway.gateway_client import (
    Client,
    Mode,
    expected,
    text,
    tokens,
)


async def test_no_chunk_ends_in_half_a_character(client: Client, tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("😀")) > 1
    for mode in (Mode.MODE_ON, Mode.MODE_OFF):
        chunks = await client.generate(mode=mode, max_tokens=200)
        assert text(chunks) == tokenizer.decode(expected(client, 200))
        assert not any("\ufffd" in chunk.text for chunk in chunks[:-1])


@pytest.mark.parametrize("offset", range(7))
async def test_a_stop_string_at_every_offset_of_a_block(client: Client, tokenizer: Tokenizer, offset: int) -> None:
    client.pair.drafter.wrong_every = 10_000
    # A prompt of another length moves the stop to another place in the block.
    prompt_ids = [5] * (7 + offset)
    plain = await client.generate(token_ids={"ids": prompt_ids}, stop_strings=["STOP"], mode=Mode.MODE_OFF)
    drafted = await client.generate(token_ids={"ids": prompt_ids}, stop_strings=["STOP"])
    assert tokens(drafted) == tokens(plain)
    assert text(drafted) == text(plain)
    full = tokenizer.decode(expected(client, prompt_length=len(prompt_ids)))
    assert text(plain) == full[: full.index("STOP")]
    assert "STOP" in tokenizer.decode(tokens(plain))
    assert "STOP" not in tokenizer.decode(tokens(plain)[:-1])
    completion = drafted[-1].completion
    assert completion.finish_reason == types_pb2.FINISH_REASON_STOP
    assert completion.stop_string == "STOP"
    assert completion.usage.num_output_tokens == len(tokens(plain))


async def test_a_stop_token_inside_a_block_is_the_last_token(client: Client) -> None:
    client.pair.drafter.wrong_every = 10_000
    stop = expected(client)[9]
    chunks = await client.generate(stop={"stop_token_ids": [stop]})
    cut = expected(client).index(stop) + 1
    assert tokens(chunks) == expected(client)[:cut]
    assert chunks[-1].completion.token_id == stop


@pytest.mark.parametrize("mode", [Mode.MODE_ON, Mode.MODE_OFF])
@pytest.mark.parametrize("includes_stop", [False, True])
async def test_a_stop_token_has_text_only_where_stops_are_included(
    client: Client, tokenizer: Tokenizer, mode: int, includes_stop: bool
) -> None:
    client.pair.drafter.wrong_every = 10_000
    stop = expected(client)[9]
    chunks = await client.generate(stop={"stop_token_ids": [stop]}, mode=mode, includes_stop=includes_stop)
    token_ids = tokens(chunks)
    assert token_ids[-1] == stop
    assert tokenizer.decode([stop])
    assert text(chunks) == tokenizer.decode(token_ids if includes_stop else token_ids[:-1])


@pytest.mark.parametrize("offset", range(5))
async def test_an_included_stop_string_ends_the_text(client: Client, offset: int) -> None:
    client.pair.drafter.wrong_every = 10_000
    prompt: dict[str, Any] = {"ids": [5] * (7 + offset)}
    cut = await client.generate(token_ids=prompt, stop_strings=["STOP"])
    whole = await client.generate(token_ids=prompt, stop_strings=["STOP"], includes_stop=True)
    assert text(whole) == text(cut) + "STOP"
    assert tokens(whole) == tokens(cut)


async def test_a_stop_string_beats_the_length_on_the_same_token(client: Client) -> None:
    whole = await client.generate(stop_strings=["STOP"])
    cut = await client.generate(stop_strings=["STOP"], max_tokens=len(tokens(whole)))
    assert cut[-1].completion.finish_reason == types_pb2.FINISH_REASON_STOP
    shorter = await client.generate(stop_strings=["STOP"], max_tokens=len(tokens(whole)) - 1)
    assert shorter[-1].completion.finish_reason == types_pb2.FINISH_REASON_LENGTH


def _anything_that_ends(random_: random.Random, client: Client, tokenizer: Tokenizer) -> dict[str, Any]:
    """A request in which stop strings, stop tokens, the length and an end token may meet in one block."""
    begins = random_.randrange(2, 12)
    said = expected(client, 60, prompt_length=begins)
    near = random_.randrange(3, 40)
    whole = tokenizer.decode(said[near : near + 4])
    strings = [whole[cut : cut + random_.randint(1, 4)] for cut in (0, 1, 3)] + ["STOP", "no such text"]
    stop: dict[str, Any] = {"max_tokens": random_.choice([near, near + 1, near + 2, near + 3, 60])}
    if random_.random() < 0.6:
        stop["stop_token_ids"] = random_.sample(said[near : near + 4], random_.randint(1, 2))
    if random_.random() < 0.3:
        stop["min_tokens"] = random_.randint(0, min(near + 2, stop["max_tokens"]))
    if random_.random() < 0.3:
        stop["ignore_eos"] = True
    return {
        "token_ids": {"ids": [5] * begins},
        "stop": stop,
        "stop_strings": [one for one in random_.sample(strings, random_.randint(0, 3)) if one],
        "includes_stop": random_.random() < 0.5,
        "num_top_logprobs": random_.randint(0, 2),
    }


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_ends_it_blocks_of_any_size_end_it_alike(
    client: Client, tokenizer: Tokenizer, seed: int
) -> None:
    """Text, tokens, log-probabilities, reason, what matched and usage are those of plain decoding."""
    random_ = random.Random(seed)
    for _ in range(25):
        request = _anything_that_ends(random_, client, tokenizer)
        plain = await client.generate(mode=Mode.MODE_OFF, max_tokens=None, **request)
        for num_levels in random_.sample(range(1, 17), 3):
            client.pair.drafter.wrong_every = random_.choice([2, 3, 5, 10_000])
            speculation = Mode(budget={"num_levels": num_levels, "width": 2, "num_nodes": 32})
            drafted = await client.generate(mode=Mode.MODE_ON, max_tokens=None, speculation=speculation, **request)
            assert (text(drafted), tokens(drafted)) == (text(plain), tokens(plain)), request
            assert _logprobs(drafted) == _logprobs(plain)
            assert _end(drafted) == _end(plain), request


def _logprobs(chunks: list[Any]) -> list[Any]:
    return [entry for chunk in chunks for entry in chunk.logprobs]


def _end(chunks: list[Any]) -> tuple[Any, ...]:
    completion = chunks[-1].completion
    usage = completion.usage
    matched = completion.WhichOneof("matched_stop")
    return (
        completion.finish_reason,
        matched and getattr(completion, matched),
        usage.num_prompt_tokens,
        usage.num_output_tokens,
    )
