"""`/v1/completions` over fakes: prompts, choices, echo, usage, streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.generation.choices import choice_seed
from gateway.text.tokenizer import Tokenizer
from tests.fakes.services import FakePair
from tests.gateway.rest.conftest import PROMPT, Rest, completion_body, refused, serving_rest

pytestmark = pytest.mark.asyncio(loop_scope="module")


def text_from(rest: Rest, tokenizer: Tokenizer, start: int, num_tokens: int = 60, seed: int = 0) -> str:
    token_ids = rest.pair.language.token_ids
    return tokenizer.decode([token_ids[(start + seed + i) % len(token_ids)] for i in range(num_tokens)])


async def test_a_completion_has_openais_shape(rest: Rest, tokenizer: Tokenizer) -> None:
    num_prompt = len(tokenizer.encode(PROMPT))
    body = await rest.completion(model="toy-base")
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "toy-base"
    assert body["choices"] == [
        {"index": 0, "text": text_from(rest, tokenizer, num_prompt), "logprobs": None, "finish_reason": "length"}
    ]
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": 60,
        "total_tokens": num_prompt + 60,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_speculation_is_reported_in_vllms_shape_and_can_be_switched_off(rest: Rest) -> None:
    body = await rest.completion(speculation={"mode": "on", "max_levels": 3, "width": 1, "max_nodes": 6})
    told = body["metrics"]["speculative_decoding"]
    assert sum(told["acceptance_histogram"]) == told["num_spec_steps"] > 0
    assert len(told["acceptance_histogram"]) == 4
    by_count = enumerate(told["acceptance_histogram"])
    assert sum(count * num_steps for count, num_steps in by_count) == told["num_accepted_draft_tokens"] > 0
    assert told["mean_acceptance_length"] == 1 + told["num_accepted_draft_tokens"] / told["num_spec_steps"]
    assert told["draft_acceptance_rate"] == told["num_accepted_draft_tokens"] / told["num_draft_tokens"]
    plain = await rest.completion(speculation={"mode": "off"})
    assert plain["choices"] == body["choices"]
    assert plain["metrics"]["speculative_decoding"]["num_spec_steps"] == 0


async def test_a_stream_carries_the_same_text_and_the_usage_last(rest: Rest) -> None:
    whole = await rest.completion(max_tokens=200)
    events = await rest.stream(
        "/v1/completions", completion_body(max_tokens=200, stream_options={"include_usage": True})
    )
    *chunks, last = events
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert not any("\ufffd" in chunk["choices"][0]["text"] for chunk in chunks)
    assert {chunk["id"] for chunk in events} == {last["id"]}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "length"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    # How many tokens were drafted follows measured time, and may be another number each time.
    assert last["metrics"]["speculative_decoding"].keys() == whole["metrics"]["speculative_decoding"].keys()
    assert "usage" not in (await rest.stream("/v1/completions", completion_body()))[-1]


@pytest.mark.parametrize(
    ("prompt", "starts"),
    [
        (PROMPT, [6]),
        ([5, 5, 5], [3]),
        (["a", "bc"], [1, 2]),
        ([[5] * 4, [5]], [4, 1]),
    ],
)
async def test_every_kind_of_prompt(rest: Rest, tokenizer: Tokenizer, prompt: Any, starts: list[int]) -> None:
    body = await rest.completion(prompt=prompt, n=2)
    texts = [text_from(rest, tokenizer, start) for start in starts for _ in range(2)]
    assert [choice["text"] for choice in body["choices"]] == texts
    assert [choice["index"] for choice in body["choices"]] == list(range(len(texts)))
    assert body["usage"]["prompt_tokens"] == sum(starts)
    assert body["usage"]["completion_tokens"] == 60 * len(texts)


async def test_choices_have_seeds_of_their_own_and_run_at_the_same_time(rest: Rest, tokenizer: Tokenizer) -> None:
    rest.pair.verifier.delay_s = 0.02
    body = await rest.completion(n=3, temperature=1, seed=11, max_tokens=20, speculation={"mode": "off"})
    start = len(tokenizer.encode(PROMPT))
    seeds = [choice_seed(11, index) for index in range(3)]
    assert seeds[0] == 11
    assert len(set(seeds)) == 3
    assert [c["text"] for c in body["choices"]] == [text_from(rest, tokenizer, start, 20, seed) for seed in seeds]
    assert body["metrics"]["seed"] == 11
    events = await rest.stream("/v1/completions", completion_body(n=3, max_tokens=20, speculation={"mode": "off"}))
    order = [event["choices"][0]["index"] for event in events]
    assert set(order[:4]) == {0, 1, 2}  # side by side, not one after the other
    assert sorted(order) == [0] * 20 + [1] * 20 + [2] * 20


async def test_a_seed_is_drawn_told_and_reproduces(rest: Rest) -> None:
    first = await rest.completion(temperature=1)
    again = await rest.completion(temperature=1, seed=first["metrics"]["seed"])
    assert again["choices"] == first["choices"]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1])
async def test_a_seed_may_be_any_of_64_bits_with_a_sign_or_without(rest: Rest, seed: int) -> None:
    body = await rest.completion(temperature=1, seed=seed, n=2)
    assert body["metrics"]["seed"] == seed
    assert (await rest.completion(temperature=1, seed=seed, n=2))["choices"] == body["choices"]


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
async def test_an_error_about_a_seed_tells_its_true_range(rest: Rest, seed: int) -> None:
    error = refused(await rest.http.post("/v1/completions", json=completion_body(seed=seed)), 400)
    assert str(2**64 - 1 if seed > 0 else -(2**63)) in error["message"]


@pytest.mark.parametrize("prompt", [PROMPT, "über 😀"])
async def test_echo_begins_with_the_prompt(rest: Rest, tokenizer: Tokenizer, prompt: str) -> None:
    plain = await rest.completion(prompt=prompt, max_tokens=5)
    echoed = await rest.completion(prompt=prompt, max_tokens=5, echo=True)
    assert echoed["choices"][0]["text"] == prompt + plain["choices"][0]["text"]
    assert echoed["usage"] == plain["usage"]
    ids = list(tokenizer.encode(prompt))
    assert (await rest.completion(prompt=ids, max_tokens=5, echo=True))["choices"] == echoed["choices"]
    events = await rest.stream("/v1/completions", completion_body(prompt=prompt, max_tokens=5, echo=True))
    assert "".join(event["choices"][0]["text"] for event in events) == echoed["choices"][0]["text"]


async def test_nothing_but_the_prompt(rest: Rest, tokenizer: Tokenizer) -> None:
    body = await rest.completion(max_tokens=0, echo=True, logprobs=1)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (PROMPT, "length")
    assert len(choice["logprobs"]["tokens"]) == len(tokenizer.encode(PROMPT))
    assert body["usage"]["completion_tokens"] == 0
    error = refused(await rest.http.post("/v1/completions", json=completion_body(max_tokens=0)), 400)
    assert error["param"] == "max_tokens"


async def test_the_default_length_is_openais(rest: Rest) -> None:
    assert (await rest.completion(max_tokens=None))["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stop", ["STOP", ["nothing", "STOP"]])
async def test_a_stop_string_ends_the_text(rest: Rest, stop: Any) -> None:
    body = await rest.completion(stop=stop)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"].endswith("中文 ")
    plain = await rest.completion(stop=stop, speculation={"mode": "off"})
    assert plain["choices"] == body["choices"]
    assert plain["usage"] == body["usage"]


@pytest.mark.asyncio(loop_scope="function")
async def test_more_prompts_than_places_wait_for_each_other(pair: FakePair, tokenizer_folder: Path) -> None:
    async with serving_rest(pair, tokenizer_folder, max_concurrent_requests=2) as rest:
        body = await rest.completion(prompt=["a"] * 7, max_tokens=8)
        assert len({choice["text"] for choice in body["choices"]}) == 1
        assert len(body["choices"]) == 7
