"""What the verifier says depends on the base model and the request alone: not on trees, batches or replicas."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import FinishReason, SamplingParameters, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from tests.conftest import started
from tests.engine_driver import GarbageDraftSession, Output, generate
from tests.fakes.checkpoints import VOCAB_SIZE, reference_model, write_checkpoint
from tests.gateway.gateway_client import eventually
from tests.speculation.reference import reference_choice, reference_processed
from verifier_service.config import VerifierSettings
from verifier_service.engine import VerifierEngine

PROMPT = (5, 8, 13, 21, 34, 55)
SAMPLED = SamplingParameters(seed=11, temperature=0.7)
GREEDY = SamplingParameters(seed=0, temperature=0.0)
PENALISED = SamplingParameters(
    seed=2**64 - 1, temperature=0.9, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.4
)


def request(sampling: SamplingParameters = SAMPLED, max_tokens: int | None = 16, **stop: Any) -> OpenVerification:
    return OpenVerification(PROMPT, sampling, StopConditions(max_tokens, **stop))


def garbage(request: OpenVerification, plain: Output, skill: float, seed: int) -> GarbageDraftSession:
    return GarbageDraftSession(request.prompt_token_ids + plain.token_ids, VOCAB_SIZE, skill, seed)


def test_this_machine_computes_a_row_alike_in_every_batch(verifier: VerifierEngine) -> None:
    """What "no difference at all" below rests on."""
    assert verifier.row_invariant


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED])
async def test_plain_decoding_is_the_choice_rule_on_the_reference_models_logits(
    verifier: VerifierEngine, base_folder: Path, sampling: SamplingParameters
) -> None:
    output = await generate(verifier, request(sampling))
    sequence = [*PROMPT, *output.token_ids]
    with torch.inference_mode():
        logits = reference_model(base_folder)(torch.tensor([sequence])).logits[0]
    expected = [
        reference_choice(logits[position - 1].tolist(), sampling, position, PROMPT, sequence[len(PROMPT) : position])
        for position in range(len(PROMPT), len(sequence))
    ]
    assert list(output.token_ids) == expected
    assert [len(round_.answer.verdict.token_ids) for round_ in output.rounds] == [1] * 16


async def test_a_right_tree_is_accepted_whole_in_one_verdict(verifier: VerifierEngine) -> None:
    """Else everything here would hold for a verifier that accepts nothing."""
    plain = await generate(verifier, request())
    session_id = await verifier.open(request())
    guess = plain.token_ids[:5]
    # The right path, a wrong sibling before each of its nodes.
    tree = TokenTree(
        tuple(t for right in guess for t in ((right + 1) % VOCAB_SIZE, right)),
        tuple(r for level in range(5) for r in (2 * level, 2 * level)),
    )
    verdict, timings = await verifier.verify(session_id, len(PROMPT), tree)
    assert verdict.token_ids == plain.token_ids[:6]
    assert verdict.accepted_rows == (2, 4, 6, 8, 10)
    assert (timings.num_batch_rows, timings.num_batch_sessions) == (11, 1)
    verdict, _ = await verifier.verify(session_id, len(PROMPT) + 6, EMPTY_TREE)
    assert verdict.token_ids == plain.token_ids[6:7]
    verifier.close(session_id)


@pytest.mark.parametrize("sampling", [GREEDY, PENALISED])
async def test_plain_rounds_unasked_say_what_asked_ones_do(
    verifier: VerifierEngine, sampling: SamplingParameters
) -> None:
    plain = await generate(verifier, request(sampling))
    session_id = await verifier.open(request(sampling))
    tree = TokenTree((plain.token_ids[0],), (0,))
    said = [one async for one, _ in verifier.verdicts(session_id, len(PROMPT), tree, 5)]
    assert [len(one.token_ids) for one in said] == [2, 1, 1, 1, 1, 1]
    said += [one async for one, _ in verifier.verdicts(session_id, len(PROMPT) + 7, EMPTY_TREE, 60)]
    assert tuple(token for one in said for token in one.token_ids) == plain.token_ids
    assert said[-1].finish_reason is FinishReason.LENGTH, "none follows a finish"
    verifier.close(session_id)


async def test_closing_ends_plain_rounds(verifier: VerifierEngine) -> None:
    session_id = await verifier.open(request(max_tokens=None))
    verdicts = verifier.verdicts(session_id, len(PROMPT), EMPTY_TREE, 60)
    await anext(verdicts)
    verifier.close(session_id)
    await eventually(lambda: verifier.kv_usage().num_sessions == 0)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED])
async def test_stops_and_limits_at_every_offset_of_a_block(
    verifier: VerifierEngine, sampling: SamplingParameters
) -> None:
    whole = await generate(verifier, request(sampling, 12))
    for offset, token_id in enumerate(whole.token_ids):
        first = whole.token_ids.index(token_id)
        stopped = (whole.token_ids[: first + 1], FinishReason.STOP, token_id)
        stop = frozenset({token_id})
        for asked, expected in (
            (request(sampling, offset + 1), (whole.token_ids[: offset + 1], FinishReason.LENGTH, None)),
            (request(sampling, 12, stop_token_ids=stop), stopped),
            (request(sampling, first + 1, stop_token_ids=stop), stopped),  # of stop and length the stop wins
        ):
            output = await generate(verifier, asked, garbage(asked, whole, 0.95, offset))
            assert output.said == expected


async def test_the_models_end_of_text_stops_inside_a_block_unless_ignored(verifier: VerifierEngine) -> None:
    eos = verifier.model_info.eos_token_ids[0]
    tempted = replace(SAMPLED, logit_bias={eos: 4.0})
    endless = await generate(verifier, request(tempted, 40, ignore_eos=True))
    assert eos in endless.token_ids[2:-1], "pick another seed"
    first = endless.token_ids.index(eos)
    for skill in (0.0, 0.9, 1.0):
        output = await generate(verifier, request(tempted, 40), garbage(request(), endless, skill, 3))
        assert output.said == (endless.token_ids[: first + 1], FinishReason.STOP, eos)
        again = await generate(verifier, request(tempted, 40, ignore_eos=True), garbage(request(), endless, skill, 3))
        assert again.said == endless.said


async def test_the_context_ends_the_output(verifier: VerifierEngine) -> None:
    context = verifier.model_info.max_model_len
    asked = OpenVerification(tuple(range(1, context - 9)), SAMPLED, StopConditions(None, ignore_eos=True))
    plain = await generate(verifier, asked)
    assert (len(plain.token_ids), plain.finish_reason) == (10, FinishReason.LENGTH)
    for seed in range(4):
        assert (await generate(verifier, asked, garbage(asked, plain, 0.8, seed))).said == plain.said


async def test_sessions_that_come_and_go_share_batches_and_nothing_else(verifier: VerifierEngine) -> None:
    """Prompts of all lengths (chunks of 256 do not cut them; blocks of 128 positions do), joining between steps."""
    rng = random.Random(5)
    asked = [
        OpenVerification(
            tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 3, 17, 120, 127, 128, 130, 200]))),
            rng.choice([GREEDY, SAMPLED, PENALISED]),
            StopConditions(rng.randrange(1, 14)),
        )
        for _ in range(12)
    ]
    alone = [await generate(verifier, one) for one in asked]

    async def late(index: int) -> Output:
        await asyncio.sleep(rng.random() * 0.1)
        return await generate(verifier, asked[index], garbage(asked[index], alone[index], rng.random(), index))

    together = await asyncio.gather(*map(late, range(12)))
    assert [output.said for output in together] == [output.said for output in alone]
    assert max(round_.answer.timings.num_batch_sessions for output in together for round_ in output.rounds) > 2
    assert sum(output.num_accepted for output in together) > 10


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, PENALISED])
async def test_another_replica_continues_a_stream_anywhere(
    verifier: VerifierEngine, sampling: SamplingParameters
) -> None:
    whole = await generate(verifier, request(sampling, 12))
    for length in range(12):
        asked = replace(request(sampling, 12), output_token_ids=whole.token_ids[:length])
        drafts = garbage(asked, whole, 0.7, length)
        assert (await generate(verifier, asked, drafts)).said == whole.said


async def test_a_long_prompt_is_prefilled_in_chunks_and_says_the_same(
    verifier: VerifierEngine, base_folder: Path
) -> None:
    prompt = tuple(np.random.default_rng(0).integers(1, VOCAB_SIZE, 230).tolist())
    asked = [OpenVerification(prompt, SAMPLED, StopConditions(8)), request()]
    expected = [(await generate(verifier, one)).said for one in asked]
    settings = VerifierSettings(
        model=str(base_folder), num_threads=1, num_kv_slots=1024, prefill_chunk=64, max_batch_rows=96
    )
    chunked = VerifierEngine(settings)
    await chunked.start()
    try:
        outputs = await asyncio.gather(*(generate(chunked, one) for one in asked))
        assert [output.said for output in outputs] == expected
    finally:
        await chunked.stop()


SMALL_VOCAB_SIZE = 12
NUM_SEEDS = 600
# Every first token is guessed, so a verdict has at least two; some have a third.
FULL_TREE = TokenTree((*range(SMALL_VOCAB_SIZE), 3, 4, 3), (*([0] * SMALL_VOCAB_SIZE), 1, 1, 4))
SMALL_PROMPT = (1, 4, 4, 7)
BASE = SamplingParameters(seed=0)
CASES = {
    "plain": BASE,
    "temperature": replace(BASE, temperature=0.5),
    "top_k": replace(BASE, top_k=3),
    "top_p": replace(BASE, top_p=0.7),
    "min_p": replace(BASE, min_p=0.3),
    "repetition": replace(BASE, repetition_penalty=3.0),
    "presence": replace(BASE, presence_penalty=2.0),
    "frequency": replace(BASE, frequency_penalty=-2.0),
    "bias": replace(BASE, logit_bias={4: 2.0, 7: -3.0}),
}


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("small"),
        vocab_size=SMALL_VOCAB_SIZE,
        num_hidden_layers=1,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
        has_tokenizer=True,
    )


@pytest.fixture(scope="module")
def small_verifier(small_folder: Path) -> Iterator[VerifierEngine]:
    engine = VerifierEngine(VerifierSettings(model=str(small_folder), num_threads=1, num_kv_slots=100_000))
    with started(engine):
        yield engine


async def two_tokens(verifier: VerifierEngine, sampling: SamplingParameters) -> tuple[int, int]:
    stop = StopConditions(3, ignore_eos=True)
    session_id = await verifier.open(OpenVerification(SMALL_PROMPT, sampling, stop))
    verdict, _ = await verifier.verify(session_id, len(SMALL_PROMPT), FULL_TREE)
    verifier.close(session_id)
    return verdict.token_ids[0], verdict.token_ids[1]


def joint_distribution(folder: Path, sampling: SamplingParameters) -> np.ndarray:
    """Probability of every pair of tokens, by the literal definition of the parameters: [V, V]."""
    sequences = torch.tensor([[*SMALL_PROMPT, token_id] for token_id in range(SMALL_VOCAB_SIZE)])
    with torch.inference_mode():
        logits = reference_model(folder)(sequences).logits.tolist()

    def probabilities(row: list[float], path: tuple[int, ...]) -> np.ndarray:
        processed = reference_processed(row, sampling, SMALL_PROMPT, (), path).astype(np.float64)
        weights = np.exp(processed - processed.max())
        return np.asarray(weights / weights.sum())

    first = probabilities(logits[0][len(SMALL_PROMPT) - 1], ())
    return np.stack([p * probabilities(logits[a][-1], (a,)) for a, p in enumerate(first)])


def p_value(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square, cells too rare for it merged; 0 if something impossible was seen."""
    if observed[probabilities == 0.0].any():
        return 0.0
    expected = probabilities * observed.sum()
    is_common = expected >= 5.0
    observed_cells = [*observed[is_common], observed[~is_common].sum()]
    expected_cells = [*expected[is_common], expected[~is_common].sum()]
    if expected_cells[-1] < 1e-9:
        observed_cells.pop(), expected_cells.pop()
    return float(scipy.stats.chisquare(observed_cells, expected_cells).pvalue)


@pytest.mark.parametrize("sampling", CASES.values(), ids=CASES.keys())
async def test_tokens_follow_the_models_own_distribution_through_trees(
    small_verifier: VerifierEngine, small_folder: Path, sampling: SamplingParameters
) -> None:
    pairs = await asyncio.gather(
        *(two_tokens(small_verifier, replace(sampling, seed=seed)) for seed in range(NUM_SEEDS))
    )
    observed = np.zeros((SMALL_VOCAB_SIZE, SMALL_VOCAB_SIZE))
    for first, second in pairs:
        observed[first, second] += 1
    assert p_value(observed, joint_distribution(small_folder, sampling)) > 1e-3
    # The test has the power to miss the parameter, or a temperature twice as high.
    wrong = BASE if sampling != BASE else replace(BASE, temperature=2.0)
    assert p_value(observed, joint_distribution(small_folder, wrong)) < 1e-3
