"""The output never depends on the drafter: real engines, a float32 model, no difference at all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from drafter_service.engine import DrafterEngine
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import (
    FinishReason,
    LayerPlanRequest,
    MlpPlacement,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)
from tests.engine_driver import Output, drafting, generate
from tests.fakes.checkpoints import VOCAB_SIZE
from tests.fakes.grammars import random_grammar
from verifier_service.engine import VerifierEngine

NUM_CASES = 200
BATCH = 25


@dataclass(frozen=True)
class Case:
    """A request and how to speculate on it."""

    request: OpenVerification
    plan: LayerPlanRequest
    budget: TreeBudget
    uses_twin: bool


def random_sampling(rng: random.Random) -> SamplingParameters:
    """Every knob off half of the time."""

    def maybe(value: float, default: float) -> float:
        return value if rng.random() < 0.5 else default

    return SamplingParameters(
        seed=rng.getrandbits(64),
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 1.4]),
        top_k=rng.choice([None, None, 1, 5, 40]),
        top_p=maybe(rng.uniform(0.5, 1.0), 1.0),
        min_p=maybe(rng.uniform(0.0, 0.2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.7, 1.6), 1.0),
        presence_penalty=maybe(rng.uniform(-1.0, 1.5), 0.0),
        frequency_penalty=maybe(rng.uniform(-0.5, 1.5), 0.0),
        logit_bias={rng.randrange(VOCAB_SIZE): rng.uniform(-4, 4) for _ in range(rng.choice([0, 0, 3]))},
    )


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    most = 240 if seed % 5 == 0 else 30
    prompt = tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, most)))
    stops = frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 20])))
    stop = StopConditions(rng.randrange(1, 24), stops, ignore_eos=rng.random() < 0.3)
    plan = LayerPlanRequest(
        rng.choice([None, 1, 2, 3, 4, 6]),
        rng.choice([None, MlpPlacement.SEQUENTIAL, MlpPlacement.STAGED]),
        calibration=rng.random() < 0.8,
    )
    budget = TreeBudget(rng.randrange(1, 8), rng.randrange(1, 7), rng.choice([1, 4, 16, 40, 64]))
    request = OpenVerification(prompt, random_sampling(rng), stop)
    return Case(with_reports(with_grammar(request, rng), rng), plan, budget, uses_twin=seed % 2 == 0)


def with_grammar(request: OpenVerification, rng: random.Random) -> OpenVerification:
    """The same under a grammar, one time out of three."""
    if rng.random() < 2 / 3:
        return request
    return replace(request, sampling=replace(request.sampling, grammar=random_grammar(rng)))


def with_reports(request: OpenVerification, rng: random.Random) -> OpenVerification:
    """The same with log-probabilities, half of the time."""
    if rng.random() < 0.5:
        return request
    return replace(request, num_top_logprobs=rng.choice([0, 1, 5, 20]), prompt_logprobs=rng.random() < 0.3)


CASES = [random_case(seed) for seed in range(NUM_CASES)]
GRAMMATICAL = [seed for seed, case in enumerate(CASES) if case.request.sampling.grammar is not None]


@pytest.fixture(scope="module")
def seen() -> list[tuple[Output, Output]]:
    return []


@pytest.mark.parametrize("first", range(0, NUM_CASES, BATCH))
async def test_speculation_says_what_plain_decoding_says(
    verifier: VerifierEngine,
    drafter: DrafterEngine,
    twin_drafter: DrafterEngine,
    seen: list[tuple[Output, Output]],
    first: int,
) -> None:
    """Sessions of a batch start together and end when they like."""
    cases = CASES[first : first + BATCH]

    async def speculate(case: Case) -> Output:
        async with drafting(twin_drafter if case.uses_twin else drafter, case.request, case.plan) as drafts:
            return await generate(verifier, case.request, drafts, case.budget)

    plain = await asyncio.gather(*(generate(verifier, case.request) for case in cases))
    drafted = await asyncio.gather(*(speculate(case) for case in cases))
    for case, expected, output in zip(cases, plain, drafted, strict=True):
        assert output.said == expected.said, case
        assert output.logprobs == expected.logprobs, case
        assert output.prompt_logprobs == expected.prompt_logprobs, case
        assert len(output.logprobs) == (0 if case.request.num_top_logprobs is None else len(output.token_ids))
    assert sum(output.num_accepted for output in drafted) > 20
    seen += zip(plain, drafted, strict=True)


def test_the_cases_were_worth_it(seen: Sequence[tuple[Output, Output]]) -> None:
    """They accept a lot, reject a lot, and end in every way, also in the middle of a block."""
    if len(seen) != NUM_CASES:
        pytest.skip("runs after all the cases above")
    num_tokens = sum(len(plain.token_ids) for plain, _ in seen)
    num_accepted = sum(drafted.num_accepted for _, drafted in seen)
    assert 0.25 < num_accepted / num_tokens < 0.9
    ends_in_a_block = [
        drafted.finish_reason
        for _, drafted in seen
        if drafted.rounds[-1].answer.verdict.num_accepted == len(drafted.rounds[-1].answer.verdict.token_ids)
    ]
    assert ends_in_a_block.count(FinishReason.STOP) > 3
    assert ends_in_a_block.count(FinishReason.LENGTH) > 10
    grammatical = [drafted for case, (_, drafted) in zip(CASES, seen, strict=True) if case.request.sampling.grammar]
    assert sum(output.num_accepted for output in grammatical) > 100
    assert sum(output.finish_reason is FinishReason.STOP for output in grammatical) > 15


async def test_a_request_says_the_same_alone(verifier: VerifierEngine) -> None:
    """Plain decoding in company is plain decoding too."""
    requests = [case.request for case in CASES[::10]]
    together = await asyncio.gather(*(generate(verifier, request) for request in requests))
    for request, expected in zip(requests, together, strict=True):
        assert (await generate(verifier, request)).said == expected.said


async def test_another_verifier_takes_over_in_mid_stream(verifier: VerifierEngine, twin_drafter: DrafterEngine) -> None:
    """Prompt, output so far and seed are all it takes, with a drafter that was re-opened as well."""
    for seed in (1, 3, 6, *GRAMMATICAL[:4]):
        case = CASES[seed]
        whole = await generate(verifier, case.request)
        for length in range(0, len(whole.token_ids), 3):
            asked = replace(case.request, output_token_ids=whole.token_ids[:length])
            async with drafting(twin_drafter, asked, case.plan) as drafts:
                output = await generate(verifier, asked, drafts, case.budget)
                assert output.said == whole.said
                assert output.logprobs == whole.logprobs[length:]
