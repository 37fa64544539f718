"""Under a grammar the drafter guesses what the verifier may accept, and nothing goes wrong where it cannot."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from drafter_service.engine import DrafterEngine
from drafter_service.fusion import union
from drafter_service.grammar_preference import GrammarPreference
from easyspec.errors import InvalidRequestError
from easyspec.speculation.grammar import GrammarState
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.messages import Calibration, OpenSpeculation, OpenVerification
from easyspec.speculation.parameters import Grammar, GrammarKind, SamplingParameters, StopConditions, TreeBudget
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources
from easyspec.speculation.token_tree import TokenTree
from tests.engine_driver import BUDGET, Output, drafting, generate
from tests.fakes.checkpoints import VOCAB_SIZE
from verifier_service.engine import VerifierEngine

MODEL = DraftSources.MODEL
PROMPT = (5, 8, 13, 21, 34, 55)
GRAMMARS = {
    "words": Grammar(GrammarKind.REGEX, "((range|return|print) [a-z]{1,3}; ){4}"),
    "json": Grammar(
        GrammarKind.JSON_SCHEMA,
        '{"type":"object","properties":{"n":{"type":"integer"},"b":{"type":"boolean"}},"required":["n","b"]}',
    ),
}
SAMPLINGS = {
    "greedy": SamplingParameters(seed=0, temperature=0.0),
    "sampled": SamplingParameters(seed=11, temperature=0.7),
}


def asked(sampling: SamplingParameters, grammar: Grammar) -> OpenVerification:
    return OpenVerification(PROMPT, replace(sampling, grammar=grammar), StopConditions(40))


async def drafted(verifier: VerifierEngine, drafter: DrafterEngine, request: OpenVerification) -> Output:
    async with drafting(drafter, request) as drafts:
        return await generate(verifier, request, drafts)


async def compiled_state(folder: Path, grammar: Grammar) -> GrammarState:
    with closing(GrammarCompiler(folder, VOCAB_SIZE, (0,))) as compiler:
        return GrammarState(await compiler.compile(grammar), ignore_eos=False)


def check_allowed(state: GrammarState, tree: TokenTree) -> None:
    """Every node may follow its parent, and nothing follows an end of sequence."""
    for row in range(1, len(tree) + 1):
        path = [tree.token_ids[node - 1] for node in tree.path_rows(row)]
        followed = sum(state.advance(token_id) for token_id in path[:-1])
        assert followed == len(path) - 1
        assert not state.has_ended
        bits = state.allowed_bits()
        assert bits[path[-1] // 8] >> path[-1] % 8 & 1, path
        state.rollback(followed)


async def until_compiled(drafter: DrafterEngine, sampling: SamplingParameters) -> None:
    """A draft is ready long before a new grammar is: it is compiled in a process of its own first."""
    assert drafter._grammars is not None
    assert sampling.grammar is not None
    while drafter._grammars.poll(sampling.grammar) is None:  # noqa: ASYNC110 (it has no event)
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS.keys())
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
async def test_drafts_hold_what_is_allowed_and_more_of_them_is_accepted(
    verifier: VerifierEngine,
    drafter: DrafterEngine,
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampling: SamplingParameters,
    grammar: Grammar,
) -> None:
    request = asked(sampling, grammar)
    plain = await generate(verifier, request)
    await drafted(verifier, drafter, request)
    await until_compiled(drafter, request.sampling)
    preferring = await drafted(verifier, drafter, request)
    assert preferring.said == plain.said
    state = await compiled_state(base_folder, grammar)
    for round_ in preferring.rounds:
        check_allowed(state, round_.draft.tree)
        for token_id in round_.answer.verdict.token_ids:
            state.advance(token_id)
    monkeypatch.setattr(GrammarPreference, "allowed_after", lambda self, tokens, paths: [None] * len(paths))
    ignorant = await drafted(verifier, drafter, request)
    assert ignorant.said == plain.said
    assert preferring.num_accepted > ignorant.num_accepted
    assert len(preferring.rounds) < len(ignorant.rounds)


@pytest.mark.parametrize("sources", [TEXT_SOURCES, TEXT_SOURCES | MODEL], ids=lambda sources: "+".join(sources.names))
async def test_guesses_from_text_are_those_that_are_allowed(
    verifier: VerifierEngine,
    drafter: DrafterEngine,
    base_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: DraftSources,
) -> None:
    """The prompt repeats what the grammar forbids; the output, what it allows."""
    request = replace(asked(SAMPLINGS["greedy"], GRAMMARS["words"]), prompt_token_ids=PROMPT * 4)
    await drafted(verifier, drafter, request)
    await until_compiled(drafter, request.sampling)

    async def draft() -> tuple[Output, bool]:
        """The output, and whether all nodes were allowed."""
        async with drafting(drafter, request, sources=sources) as drafts:
            output = await generate(verifier, request, drafts)
        state = await compiled_state(base_folder, GRAMMARS["words"])
        is_allowed = True
        for round_ in output.rounds:
            try:
                check_allowed(state, round_.draft.tree)
            except AssertionError:
                return output, False
            for token_id in round_.answer.verdict.token_ids:
                state.advance(token_id)
        return output, is_allowed

    preferring, is_allowed = await draft()
    assert is_allowed
    assert any(source & TEXT_SOURCES for round_ in preferring.rounds for source in round_.draft.node_sources)
    monkeypatch.setattr(union, "may_follow", lambda bits, token_id: True)
    ignorant, is_allowed = await draft()
    assert not is_allowed
    assert ignorant.said == preferring.said


async def test_a_session_opened_in_mid_output_knows_where_it_is(
    verifier: VerifierEngine, drafter: DrafterEngine, base_folder: Path
) -> None:
    request = asked(SAMPLINGS["sampled"], GRAMMARS["words"])
    plain = await generate(verifier, request)
    await drafted(verifier, drafter, request)
    for length in range(len(plain.token_ids) - 1):
        state = await compiled_state(base_folder, GRAMMARS["words"])
        for token_id in plain.token_ids[: length + 1]:
            state.advance(token_id)
        committed = PROMPT + plain.token_ids[:length]
        session_id = await drafter.open(
            OpenSpeculation(committed, request.sampling, num_output_tokens=length, sources=MODEL)
        )
        calibration = Calibration(len(committed), plain.token_ids[length : length + 1], BUDGET)
        draft = await drafter.draft(session_id, calibration)
        drafter.close(session_id)
        assert len(draft.tree) > 0
        check_allowed(state, draft.tree)
    with pytest.raises(InvalidRequestError, match="num_output_tokens"):
        await drafter.open(OpenSpeculation(PROMPT, request.sampling, num_output_tokens=len(PROMPT) + 1))


async def test_there_is_nothing_to_guess_after_the_end(drafter: DrafterEngine) -> None:
    sampling = replace(SAMPLINGS["greedy"], grammar=Grammar(GrammarKind.REGEX, "[^\\x00]?"))
    session_id = await drafter.open(OpenSpeculation(PROMPT, sampling, sources=MODEL))
    await until_compiled(drafter, sampling)
    drafter.close(session_id)
    session_id = await drafter.open(OpenSpeculation(PROMPT, sampling, sources=MODEL))
    draft = await drafter.draft(session_id, Calibration(len(PROMPT), (66,), BUDGET))
    drafter.close(session_id)
    assert draft.tree == TokenTree((0,), (0,))  # one character was said: the end is all that may follow


async def test_grammars_in_one_batch_do_not_meet(verifier: VerifierEngine, drafter: DrafterEngine) -> None:
    requests = [asked(sampling, grammar) for sampling in SAMPLINGS.values() for grammar in GRAMMARS.values()]
    requests += [replace(request, sampling=replace(request.sampling, grammar=None)) for request in requests[:2]]
    alone = [await drafted(verifier, drafter, request) for request in requests]
    together = await asyncio.gather(*(drafted(verifier, drafter, request) for request in requests))
    assert [output.said for output in together] == [output.said for output in alone]
    assert sum(output.num_accepted for output in together) > 20


@pytest.mark.parametrize("text", ["(a", "x"])
async def test_what_cannot_be_compiled_or_followed_costs_the_preference_alone(
    verifier: VerifierEngine, drafter: DrafterEngine, text: str
) -> None:
    """The drafter may be told another grammar than the verifier, or none that it knows."""
    request = OpenVerification(PROMPT, SAMPLINGS["greedy"], StopConditions(20, ignore_eos=True))
    plain = await generate(verifier, request)
    misled = replace(request, sampling=replace(request.sampling, grammar=Grammar(GrammarKind.REGEX, text)))
    for _ in range(2):
        async with drafting(drafter, misled) as drafts:
            assert (await generate(verifier, request, drafts)).said == plain.said


async def test_a_grammar_still_being_compiled_delays_nothing(
    drafter: DrafterEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GrammarCompiler, "poll", lambda *_: None)
    sampling = replace(SAMPLINGS["greedy"], grammar=GRAMMARS["json"])
    session_id = await drafter.open(OpenSpeculation(PROMPT, sampling, sources=MODEL))
    budget = TreeBudget(2, 2, 8)
    draft = await drafter.draft(session_id, Calibration(len(PROMPT), (9,), budget))
    drafter.close(session_id)
    assert len(draft.tree) == 8
