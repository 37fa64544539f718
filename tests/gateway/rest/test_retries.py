"""OpenAI's client, told to come again, does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from easyspec.errors import CapacityError, UnavailableError
from tests.fakes.services import FakePair
from tests.gateway.rest.conftest import PROMPT, Rest, serving_rest


def client_of(rest: Rest, max_retries: int) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{rest.base_url}/v1", api_key="none", max_retries=max_retries)


async def test_a_full_gateway_refuses_and_serves_the_retry(pair: FakePair, tokenizer_folder: Path) -> None:
    pair.verifier.delay_s = 0.02
    limits = {"max_concurrent_requests": 1, "max_waiting_requests": 0, "admission_timeout_s": 0.1}
    async with serving_rest(pair, tokenizer_folder, **limits) as rest, client_of(rest, 0) as hasty:
        long = await hasty.completions.create(model="toy-base", prompt=PROMPT, max_tokens=1000, stream=True)
        await anext(aiter(long))
        with pytest.raises(openai.RateLimitError) as caught:
            await hasty.completions.create(model="toy-base", prompt=PROMPT)
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        async with client_of(rest, 20) as patient:
            waiting = asyncio.create_task(patient.completions.create(model="toy-base", prompt=PROMPT, max_tokens=5))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            await long.close()
            reply = await asyncio.wait_for(waiting, 10)
        assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize("error", [CapacityError("no KV memory", 0.05), UnavailableError("lost")])
async def test_a_passing_failure_behind_the_gateway_is_retried(rest: Rest, error: Exception) -> None:
    rest.pair.verifier.error = error
    async with client_of(rest, 5) as client:
        waiting = asyncio.create_task(
            client.chat.completions.create(
                model="toy-base", messages=[{"role": "user", "content": "hi"}], max_tokens=5, stream=False
            )
        )
        await asyncio.sleep(0.2)
        rest.pair.verifier.error = None
        reply = await asyncio.wait_for(waiting, 20)
    assert reply.choices[0].message.content
