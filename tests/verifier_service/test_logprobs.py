"""Log-probabilities are the base model's own, the same bits with any draft and any batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from easyspec.errors import InvalidRequestError
from easyspec.speculation.messages import OpenVerification, TokenLogprobs
from easyspec.speculation.parameters import Grammar, GrammarKind, SamplingParameters, StopConditions
from tests.engine_driver import GarbageDraftSession, Output, generate
from tests.fakes.checkpoints import VOCAB_SIZE, reference_model
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

PROMPT = (5, 8, 13, 21, 34, 55)
PROCESSED = SamplingParameters(
    seed=4,
    temperature=0.6,
    top_k=4,
    repetition_penalty=1.5,
    logit_bias={7: 5.0},
    grammar=Grammar(GrammarKind.REGEX, "[a-z ]{40}"),
)
SAMPLINGS = {
    "greedy": SamplingParameters(seed=0, temperature=0.0),
    "sampled": SamplingParameters(seed=11, temperature=0.9),
    "processed": PROCESSED,
}


def asked(
    sampling: SamplingParameters,
    num_top: int | None = 3,
    prompt: tuple[int, ...] = PROMPT,
    *,
    has_prompt: bool = False,
    max_tokens: int = 14,
) -> OpenVerification:
    stop = StopConditions(max_tokens, ignore_eos=True)
    return OpenVerification(prompt, sampling, stop, num_top_logprobs=num_top, prompt_logprobs=has_prompt)


def reference(folder: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """Row i: log-probabilities of what follows the first i + 1 tokens; [T, V]."""
    with torch.inference_mode():
        return reference_model(folder)(torch.tensor([list(token_ids)])).logits[0].double().log_softmax(-1)


def check(entry: TokenLogprobs, token_id: int, expected: torch.Tensor, num_top: int) -> None:
    assert entry.logprob == pytest.approx(float(expected[token_id]), abs=2e-4)
    assert len(entry.top) == num_top
    for (top_id, logprob), best in zip(entry.top, expected.topk(num_top).values.tolist(), strict=True):
        assert logprob == pytest.approx(best, abs=2e-4)
        assert logprob == pytest.approx(float(expected[top_id]), abs=2e-4)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
async def test_they_are_the_base_models_before_any_processing(
    verifier: VerifierEngine, base_folder: Path, sampling: SamplingParameters
) -> None:
    output = await generate(verifier, asked(sampling))
    expected = reference(base_folder, PROMPT + output.token_ids)
    assert len(output.logprobs) == len(output.token_ids) == 14
    for index, (token_id, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        check(entry, token_id, expected[len(PROMPT) + index - 1], 3)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("num_top", [0, 20])
async def test_drafting_and_company_change_no_bit(
    verifier: VerifierEngine, sampling: SamplingParameters, num_top: int
) -> None:
    request = asked(sampling, num_top)
    plain = await generate(verifier, request)

    async def drafted(seed: int) -> Output:
        truth = PROMPT + plain.token_ids
        return await generate(verifier, request, GarbageDraftSession(truth, VOCAB_SIZE, 0.9, seed))

    outputs = await asyncio.gather(*map(drafted, range(6)))
    assert sum(output.num_accepted for output in outputs) > 10
    for output in outputs:
        assert output.said == plain.said
        assert output.logprobs == plain.logprobs
    assert (await generate(verifier, replace(request, num_top_logprobs=None))).logprobs == ()
    for length in (1, 5):
        resumed = await generate(verifier, replace(request, output_token_ids=plain.token_ids[:length]))
        assert resumed.logprobs == plain.logprobs[length:]


async def test_nothing_is_said_of_tokens_after_a_stop(verifier: VerifierEngine) -> None:
    request = asked(SAMPLINGS["sampled"])
    plain = await generate(verifier, request)
    for offset, token_id in enumerate(plain.token_ids):
        length = plain.token_ids.index(token_id) + 1
        stopping = replace(request, stop=replace(request.stop, stop_token_ids=frozenset({token_id})))
        drafts = GarbageDraftSession(PROMPT + plain.token_ids, VOCAB_SIZE, 1.0, offset)
        output = await generate(verifier, stopping, drafts)
        assert (output.token_ids, output.logprobs) == (plain.token_ids[:length], plain.logprobs[:length])


async def test_a_prompts_own_come_once_with_the_first_verdict(verifier: VerifierEngine, base_folder: Path) -> None:
    for prompt in ((7,), PROMPT, tuple(np.random.default_rng(1).integers(1, VOCAB_SIZE, 230).tolist())):
        output = await generate(verifier, asked(SAMPLINGS["sampled"], 2, prompt, has_prompt=True, max_tokens=3))
        first, *others = (round_.answer.verdict.prompt_logprobs for round_ in output.rounds)
        assert others == [(), ()]
        expected = reference(base_folder, prompt)
        assert len(first) == len(prompt) - 1
        for index, entry in enumerate(first):
            check(entry, prompt[index + 1], expected[index], 2)
        unasked = await generate(verifier, asked(SAMPLINGS["sampled"], 2, prompt, max_tokens=3))
        assert unasked.rounds[0].answer.verdict.prompt_logprobs == ()
        assert unasked.logprobs == output.logprobs


async def test_a_prompts_own_do_not_depend_on_chunks_and_company(verifier: VerifierEngine, base_folder: Path) -> None:
    prompt = tuple(np.random.default_rng(2).integers(1, VOCAB_SIZE, 230).tolist())
    request = asked(SAMPLINGS["greedy"], 5, prompt, has_prompt=True, max_tokens=3)
    expected = (await generate(verifier, request)).rounds[0].answer.verdict.prompt_logprobs
    settings = VerifierSettings(
        model=str(base_folder), num_threads=1, num_kv_slots=2048, prefill_chunk=50, max_batch_rows=96
    )
    engine = VerifierEngine(settings)
    await engine.start()
    try:
        resumed = replace(request, output_token_ids=(3, 4))
        outputs = await asyncio.gather(
            *(generate(engine, one) for one in (request, asked(SAMPLINGS["sampled"]), request, resumed))
        )
    finally:
        await engine.stop()
    for index in (0, 2, 3):
        assert outputs[index].rounds[0].answer.verdict.prompt_logprobs == expected


async def test_what_is_out_of_range_is_refused_before_anything_is_held(verifier: VerifierEngine) -> None:
    before = verifier.kv_usage()
    for request, field in (
        (asked(SAMPLINGS["greedy"], 21), "num_top_logprobs"),
        (asked(SAMPLINGS["greedy"], None, has_prompt=True), "prompt_logprobs"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            await verifier.open(request)
        assert caught.value.field == field
    assert verifier.kv_usage() == before
