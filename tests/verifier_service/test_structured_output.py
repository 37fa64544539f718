"""Grammars at the verifier: enforced at every token, the same with any tree, and an error to their sender alone."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from easyspec.errors import InvalidRequestError
from easyspec.speculation.messages import OpenVerification, Verdict
from easyspec.speculation.parameters import (
    FinishReason,
    Grammar,
    GrammarKind,
    SamplingParameters,
    StopConditions,
    Thinking,
)
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from tests.engine_driver import GarbageDraftSession, Output, generate
from tests.fakes.checkpoints import VOCAB_SIZE
from tests.fakes.servers import eventually
from verifier_service.engine import VerifierEngine

PROMPT = (5, 8, 13, 21, 34, 55)
EOS = 0
WORDS = "(range|return|print){2,4}( [a-z]{1,3})?"
SAMPLINGS = {
    "greedy": SamplingParameters(seed=0, temperature=0.0),
    "sampled": SamplingParameters(seed=11, temperature=0.9),
    "everything": SamplingParameters(
        seed=2**64 - 1,
        temperature=1.3,
        top_k=5,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.4,
        presence_penalty=-0.5,
        frequency_penalty=0.8,
        logit_bias={EOS: 8.0, 77: 50.0, 90: -100.0},
    ),
}


def asked(
    sampling: SamplingParameters, grammar: str = WORDS, max_tokens: int = 40, *, ignore_eos: bool = False
) -> OpenVerification:
    sampling = replace(sampling, grammar=Grammar(GrammarKind.REGEX, grammar))
    return OpenVerification(PROMPT, sampling, StopConditions(max_tokens, ignore_eos=ignore_eos))


@pytest.fixture(scope="module")
def backend(base_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(base_folder / "tokenizer.json"))


def text(backend: Tokenizer, output: Output) -> str:
    """The output without the end of sequence that every complete one has."""
    assert output.finish_reason is FinishReason.STOP
    assert output.token_ids[-1] == output.matched_stop_token_id == EOS
    return str(backend.decode(list(output.token_ids[:-1]), skip_special_tokens=False))


def chain(token_ids: tuple[int, ...]) -> TokenTree:
    return TokenTree(token_ids, tuple(range(len(token_ids))))


def is_empty(verifier: VerifierEngine) -> bool:
    """Prefixes may be kept for others."""
    usage = verifier.kv_usage()
    return (usage.num_sessions, usage.num_used_slots) == (0, 0)


async def verdicts(verifier: VerifierEngine, request: OpenVerification, *trees: TokenTree) -> list[Verdict]:
    session_id = await verifier.open(request)
    base_length = len(request.prompt_token_ids) + len(request.output_token_ids)
    taken = []
    try:
        for tree in trees:
            taken.append((await verifier.verify(session_id, base_length, tree))[0])
            base_length += len(taken[-1].token_ids)
    finally:
        verifier.close(session_id)
    return taken


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
async def test_output_matches_with_any_tree(
    verifier: VerifierEngine, backend: Tokenizer, sampling: SamplingParameters
) -> None:
    request = asked(sampling)
    plain = await generate(verifier, request)
    assert re.fullmatch(WORDS, text(backend, plain))
    free = await generate(verifier, replace(request, sampling=sampling))
    assert free.said != plain.said
    num_accepted = 0
    for seed, skill in enumerate((0.0, 0.8, 0.95, 1.0)):
        drafts = GarbageDraftSession(PROMPT + plain.token_ids, VOCAB_SIZE, skill, seed)
        drafted = await generate(verifier, request, drafts)
        assert drafted.said == plain.said
        num_accepted += drafted.num_accepted
    assert num_accepted > 10


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
async def test_a_grammar_ends_inside_a_block(verifier: VerifierEngine, sampling: SamplingParameters) -> None:
    """With guesses that go on after the end, guessed or not: nothing leaks, and the end is the grammar's."""
    request = asked(sampling)
    plain = await generate(verifier, request)
    assert len(plain.token_ids) < 40
    for tail in ((), (EOS,), (EOS, 77), (EOS, EOS, 77), (77, 78)):
        for skipped in range(len(plain.token_ids)):
            resumed = replace(request, output_token_ids=plain.token_ids[:skipped])
            (verdict,) = await verdicts(verifier, resumed, chain(plain.token_ids[skipped:-1] + tail))
            assert plain.token_ids[:skipped] + verdict.token_ids == plain.token_ids
            assert (verdict.finish_reason, verdict.matched_stop_token_id) == (FinishReason.STOP, EOS)
            assert verdict.num_accepted == len(verdict.token_ids) - (tail[:1] != (EOS,))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
async def test_with_ignore_eos_it_ends_only_where_nothing_can_follow(
    verifier: VerifierEngine, backend: Tokenizer, sampling: SamplingParameters
) -> None:
    request = asked(sampling, "(range|return){2,3}", ignore_eos=True)
    plain = await generate(verifier, request)
    assert re.fullmatch("(range|return){3}", text(backend, plain))
    drafts = GarbageDraftSession(PROMPT + plain.token_ids, VOCAB_SIZE, 0.9, 1)
    assert (await generate(verifier, request, drafts)).said == plain.said


async def test_nodes_that_the_grammar_forbids_harm_nobody(verifier: VerifierEngine) -> None:
    request = asked(SAMPLINGS["greedy"])
    plain = await generate(verifier, request)
    forbidden = next(t for t in range(1, VOCAB_SIZE) if t not in plain.token_ids)
    tree = TokenTree((forbidden, plain.token_ids[0], forbidden, plain.token_ids[1], EOS), (0, 0, 1, 2, 3))
    (verdict,) = await verdicts(verifier, request, tree)
    assert verdict.token_ids == plain.token_ids[:3]
    assert verdict.accepted_rows == (2, 4)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
async def test_length_cuts_and_a_stop_token_ends_it_early(
    verifier: VerifierEngine, sampling: SamplingParameters
) -> None:
    plain = await generate(verifier, asked(sampling))
    for length in range(1, len(plain.token_ids)):
        drafts = GarbageDraftSession(PROMPT + plain.token_ids, VOCAB_SIZE, 0.95, length)
        output = await generate(verifier, asked(sampling, max_tokens=length), drafts)
        assert output.said == (plain.token_ids[:length], FinishReason.LENGTH, None)
        token_id = plain.token_ids[length - 1]
        first = plain.token_ids.index(token_id) + 1
        request = asked(sampling)
        request = replace(request, stop=replace(request.stop, stop_token_ids=frozenset({token_id})))
        drafts = GarbageDraftSession(PROMPT + plain.token_ids, VOCAB_SIZE, 0.95, length)
        assert (await generate(verifier, request, drafts)).said == (
            plain.token_ids[:first],
            FinishReason.STOP,
            token_id,
        )


async def test_another_replica_continues_it_anywhere_but_not_beside_the_grammar(verifier: VerifierEngine) -> None:
    request = asked(SAMPLINGS["sampled"])
    plain = await generate(verifier, request)
    for length in range(len(plain.token_ids)):
        resumed = replace(request, output_token_ids=plain.token_ids[:length])
        assert (await generate(verifier, resumed)).said == plain.said
    wrong = next(t for t in range(1, VOCAB_SIZE) if t not in plain.token_ids)
    with pytest.raises(InvalidRequestError, match=r"output_token_ids\[1\] is"):
        await verifier.open(replace(request, output_token_ids=(plain.token_ids[0], wrong)))


async def test_bad_grammars_are_refused_when_the_session_opens(verifier: VerifierEngine) -> None:
    before = verifier.kv_usage()
    for grammar, message in (("(a", "unclosed"), ("x" * 70_000, "65536 bytes")):
        with pytest.raises(InvalidRequestError, match=f"sampling.grammar.regex .*{message}"):
            await verifier.open(asked(SAMPLINGS["greedy"], grammar))
    assert verifier.kv_usage() == before


async def test_one_that_becomes_too_complex_ends_its_own_session_alone(
    verifier: VerifierEngine, backend: Tokenizer
) -> None:
    """In the same batch as others, with a tree, and without a trace in memory."""
    grammar = Grammar(GrammarKind.LARK, "start: A\nA: ~/.*a.{14}b.*/ & /.{20,90}/")
    request = asked(SAMPLINGS["sampled"])
    plain = await generate(verifier, request)
    letters = {backend.token_to_id(letter): 30.0 for letter in "ab"}
    monster = replace(request, sampling=replace(request.sampling, grammar=grammar, logit_bias=letters))
    outcomes = await asyncio.gather(
        *(generate(verifier, one) for one in (request, monster, request)), return_exceptions=True
    )
    assert isinstance(outcomes[1], InvalidRequestError)
    assert outcomes[1].field == "sampling.grammar.lark"
    for outcome in (outcomes[0], outcomes[2]):
        assert isinstance(outcome, Output)
        assert outcome.said == plain.said
    await eventually(lambda: is_empty(verifier), within_s=5.0)
    session_id = await verifier.open(monster)
    error = None
    for base_length in range(len(PROMPT), len(PROMPT) + 60):
        try:
            await verifier.verify(session_id, base_length, chain((1, 2, 3)) if base_length % 2 else EMPTY_TREE)
        except InvalidRequestError as caught:
            error = caught
            break
    assert error is not None
    assert error.field == "sampling.grammar.lark"
    assert (await generate(verifier, request)).said == plain.said  # while the broken session still holds its memory
    with pytest.raises(InvalidRequestError, match="an open session that has not finished"):
        await verifier.verify(session_id, len(PROMPT), EMPTY_TREE)
    verifier.close(session_id)
    assert (await generate(verifier, request)).said == plain.said
    await eventually(lambda: is_empty(verifier), within_s=5.0)


async def test_many_grammars_and_none_share_batches(verifier: VerifierEngine, backend: Tokenizer) -> None:
    patterns = [WORDS, "[0-9]{1,12}", "(ab|ba)*c", "é{1,3}😀?", "[^a-z]{5}"]
    requests = [asked(SAMPLINGS[name], pattern) for pattern in patterns for name in SAMPLINGS]
    requests += [replace(requests[index], sampling=SAMPLINGS[name]) for index, name in enumerate(SAMPLINGS)]
    alone = [await generate(verifier, request) for request in requests]

    async def drafted(index: int) -> Output:
        truth = PROMPT + alone[index].token_ids
        return await generate(verifier, requests[index], GarbageDraftSession(truth, VOCAB_SIZE, 0.9, index))

    together = await asyncio.gather(*map(drafted, range(len(requests))))
    assert [output.said for output in together] == [output.said for output in alone]
    for request, output in zip(requests, together, strict=True):
        grammar = request.sampling.grammar
        if grammar is not None and output.finish_reason is FinishReason.STOP:
            assert re.fullmatch(grammar.text, text(backend, output))


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
async def test_a_grammar_begins_where_thinking_ends_with_any_tree(
    verifier: VerifierEngine, backend: Tokenizer, sampling: SamplingParameters, is_open: bool
) -> None:
    """Also where the closing mark lies inside a token, or inside an accepted block."""
    request = asked(sampling, max_tokens=60)
    thinking = Thinking("for", "re", is_open)
    grammar = Grammar(GrammarKind.REGEX, WORDS, thinking)
    request = replace(request, sampling=replace(sampling, grammar=grammar))
    plain = await generate(verifier, request)
    said = str(backend.decode([token_id for token_id in plain.token_ids if token_id != EOS]))
    begins = is_open or said.startswith("for")
    answer = said.partition("re")[2].lstrip(" \n") if begins else said
    if plain.finish_reason is FinishReason.STOP:
        assert re.fullmatch(WORDS, answer)
    else:
        assert "re" not in said[:-40]
    num_accepted = 0
    for seed, skill in enumerate((0.8, 1.0)):
        drafts = GarbageDraftSession(PROMPT + plain.token_ids, VOCAB_SIZE, skill, seed)
        drafted = await generate(verifier, request, drafts)
        assert drafted.said == plain.said
        num_accepted += drafted.num_accepted
    assert num_accepted > 5
    for skipped in range(0, len(plain.token_ids), 5):
        resumed = replace(request, output_token_ids=plain.token_ids[:skipped])
        (verdict,) = await verdicts(verifier, resumed, EMPTY_TREE)
        assert verdict.token_ids == plain.token_ids[skipped : skipped + 1]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
@pytest.mark.parametrize("min_tokens", [1, 7, 20])
async def test_nothing_stops_before_the_least_number_of_tokens(
    verifier: VerifierEngine, sampling: SamplingParameters, min_tokens: int
) -> None:
    eager = replace(sampling, logit_bias={EOS: 100.0, 77: 100.0})
    stop = StopConditions(30, frozenset({77}), min_tokens=min_tokens)
    plain = await generate(verifier, OpenVerification(PROMPT, eager, stop))
    ends = [index for index, token_id in enumerate(plain.token_ids) if token_id in (EOS, 77)]
    assert ends == [min_tokens]
    assert plain.finish_reason is FinishReason.STOP
    for seed, skill in enumerate((0.8, 1.0)):
        drafts = GarbageDraftSession(PROMPT + plain.token_ids, VOCAB_SIZE, skill, seed)
        assert (await generate(verifier, OpenVerification(PROMPT, eager, stop), drafts)).said == plain.said
    # A grammar that leaves nothing but the end comes first.
    short = replace(eager, grammar=Grammar(GrammarKind.REGEX, "ab?"))
    output = await generate(verifier, OpenVerification(PROMPT, short, replace(stop, min_tokens=20)))
    assert output.finish_reason is FinishReason.STOP
    assert 2 <= len(output.token_ids) <= 3
