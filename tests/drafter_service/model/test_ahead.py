"""Drafting ahead: a verdict that was guessed finds its tree, one that was not costs nothing but slots."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from drafter_service.model.ahead import Ahead, likeliest_rows
from drafter_service.session import DraftTask
from drafter_service.worth import Trial
from easyspec.speculation.messages import Draft
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.token_tree import ScoredTree, TokenTree
from tests.drafter_service.core_driver import BUDGET, GREEDY, PAPER, SAMPLED, SEQUENTIAL, CoreDriver, build_core
from tests.fakes.checkpoints import VOCAB_SIZE

PROMPT = tuple(random.Random(3).randrange(VOCAB_SIZE) for _ in range(40))


@pytest.fixture(scope="module")
def going_ahead(draft_folder: Path) -> CoreDriver:
    return build_core(draft_folder, share_prefixes=False, num_guesses=3)


@pytest.fixture
def ahead(going_ahead: CoreDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[CoreDriver]:
    monkeypatch.setattr(Trial, "observe", lambda self, **_: None)  # it stays on
    yield going_ahead
    assert going_ahead.memory.num_used_slots == 0, "every slot was given back"


def rest(core: CoreDriver) -> None:
    """Let the core do what it can while nothing is asked."""
    while core.drafter.step():
        pass


def answer(core: CoreDriver, task: DraftTask) -> Draft:
    return core.finish([task])[0]


def guesses(core: CoreDriver, session_id: int) -> list[list[int]]:
    """The verdicts that a session expects."""
    ahead = core.state(session_id).ahead
    assert isinstance(ahead, Ahead)
    return [[*said] for said in ahead.guesses]


def rounds(core: CoreDriver, session_id: int, num_rounds: int, *, hits: bool) -> tuple[list[int], list[Draft]]:
    """Rounds whose verdicts are, or are not, among the guesses; the tokens and the drafts that came of them."""
    tokens, drafts, said = [*PROMPT], [], [9]
    for _ in range(num_rounds):
        drafts.append(answer(core, core.ask(session_id, len(tokens), said, BUDGET)))
        tokens += said
        rest(core)
        expected = guesses(core, session_id)
        said = expected[0] if hits else [*expected[0][:-1], _other_token(expected)]
    return tokens, drafts


def _other_token(expected: Sequence[Sequence[int]]) -> int:
    return next(token for token in range(VOCAB_SIZE) if all(token != said[-1] for said in expected))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize("plan", [SEQUENTIAL, PAPER])
@pytest.mark.parametrize("hits", [True, False])
def test_kv_is_what_calibration_makes_it(ahead: CoreDriver, sampling: object, plan: object, hits: bool) -> None:
    session_id = ahead.open(PROMPT, sampling, plan)  # type: ignore[arg-type]
    tokens, drafts = rounds(ahead, session_id, 5, hits=hits)
    outcomes = [draft.timings.ahead_ns for draft in drafts]
    assert outcomes[0] is None, "nothing was sent before the first"
    assert all((outcome or 0) > 0 for outcome in outcomes[1:]) if hits else outcomes[1:] == [0] * 4
    assert all(draft.timings.num_fuzzy_steps == 0 for draft in drafts[1:]) if hits else True
    fresh_id = ahead.open(tokens[:-1])
    ahead.draft(fresh_id, len(tokens) - 1, tokens[-1:], TreeBudget(1, 1, 1))
    difference = (ahead.kv(session_id, len(tokens)) - ahead.kv(fresh_id, len(tokens))).abs().max().item()
    assert difference < 1e-5
    ahead.close(session_id)
    ahead.close(fresh_id)


def test_a_tree_drafted_ahead_is_the_tree_drafted_afterwards(ahead: CoreDriver, core: CoreDriver) -> None:
    """With sequential steps there is nothing fuzzy to differ by; sharpness moves a little between the two."""
    session_id, plain_id = ahead.open(PROMPT, SAMPLED), core.open(PROMPT, SAMPLED)
    tokens, drafts = rounds(ahead, session_id, 2, hits=True)
    core.draft(plain_id, len(PROMPT), (9,))
    tree = core.draft(plain_id, len(PROMPT) + 1, tokens[len(PROMPT) + 1 :])
    assert drafts[1].tree.token_ids[0] == tree.token_ids[0]
    assert len(set(drafts[1].tree.token_ids) & set(tree.token_ids)) >= len(tree) // 2
    ahead.close(session_id)
    core.close(plain_id)


def test_a_verdict_that_comes_early_finds_what_there_is(ahead: CoreDriver) -> None:
    session_id = ahead.open(PROMPT, SAMPLED)
    answer(ahead, ahead.ask(session_id, len(PROMPT), (9,), BUDGET))
    ahead.drafter.step()  # the path was read when the tree had been sent; now the bonus tokens
    said = guesses(ahead, session_id)[0]
    draft = answer(ahead, ahead.ask(session_id, len(PROMPT) + 1, said, BUDGET))
    assert draft.timings.ahead_ns
    assert draft.timings.num_fuzzy_steps == BUDGET.num_levels - 1, "it grows on from the first level"
    ahead.close(session_id)


def test_another_budget_takes_the_text_but_not_the_tree(ahead: CoreDriver) -> None:
    session_id = ahead.open(PROMPT, SAMPLED)
    answer(ahead, ahead.ask(session_id, len(PROMPT), (9,), BUDGET))
    rest(ahead)
    said = guesses(ahead, session_id)[0]
    draft = answer(ahead, ahead.ask(session_id, len(PROMPT) + 1, said, TreeBudget(2, 2, 4)))
    assert draft.timings.ahead_ns == 0
    assert draft.tree.num_levels <= 2
    ahead.close(session_id)


def test_nothing_goes_ahead_while_a_session_waits(ahead: CoreDriver) -> None:
    first, second = ahead.open(PROMPT, SAMPLED), ahead.open(PROMPT[::-1], GREEDY)
    answer(ahead, ahead.ask(first, len(PROMPT), (9,), BUDGET))
    task = ahead.ask(second, len(PROMPT), (9,), BUDGET)
    while not task.future.done():
        ahead.drafter.step()
        taken = ahead.state(first).ahead
        assert isinstance(taken, Ahead)
        assert task.future.done() or all(guess.num_uncached for guess in taken.guesses.values())
    ahead.close(first)
    ahead.close(second)


def test_memory_that_others_want_is_not_kept(draft_folder: Path) -> None:
    core = build_core(draft_folder, num_kv_slots=176, share_prefixes=False, num_guesses=3)
    session_id = core.open(PROMPT, SAMPLED)
    answer(core, core.ask(session_id, len(PROMPT), (9,), BUDGET))
    rest(core)
    assert core.memory.num_available >= 64, "as many as a tree may need stay free"
    newcomer = core.open(PROMPT, GREEDY)
    for open_id in (session_id, newcomer):
        core.close(open_id)
    assert core.memory.num_used_slots == 0


def test_a_fault_frees_what_was_drafted_ahead(ahead: CoreDriver) -> None:
    session_id = ahead.open(PROMPT, SAMPLED)
    answer(ahead, ahead.ask(session_id, len(PROMPT), (9,), BUDGET))
    rest(ahead)
    ahead.drafter.abandon(RuntimeError("no idea"))
    assert ahead.state(session_id).ahead is None
    tree = ahead.draft(session_id, len(PROMPT) + 1, (7,))
    assert len(tree) > 0, "it goes on"
    ahead.close(session_id)


def test_a_pass_that_fails_ahead_keeps_no_slots(ahead: CoreDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no idea")

    session_id = ahead.open(PROMPT, SAMPLED)
    answer(ahead, ahead.ask(session_id, len(PROMPT), (9,), BUDGET))  # which reads the tree that is sent, too
    monkeypatch.setattr(ahead.model.decoder, "forward", fail)
    with pytest.raises(RuntimeError, match="no idea") as failure:
        ahead.drafter.step()
    ahead.drafter.abandon(failure.value)
    ahead.close(session_id)


def test_only_rounds_that_go_ahead_are_counted_as_such(ahead: CoreDriver) -> None:
    session_id = ahead.open(PROMPT, SAMPLED, max_total_length=len(PROMPT) + 3)
    answer(ahead, ahead.ask(session_id, len(PROMPT), (9,), BUDGET))
    round_ = ahead.drafter._sessions[session_id].round
    assert round_ is not None
    assert ahead.state(session_id).ahead is None, "the end is too near"
    assert not round_.went_ahead
    ahead.close(session_id)


def test_the_likeliest_rows_come_with_their_parents() -> None:
    tree = TokenTree((5, 6, 7, 8, 9), (0, 0, 2, 2, 4))
    sent = ScoredTree(tree, (-1.0, -0.5, -2.0, -0.9, -1.5))
    assert likeliest_rows(sent, 3) == [1, 2, 4]
    assert likeliest_rows(sent, 9) == [1, 2, 3, 4, 5]
    assert likeliest_rows(ScoredTree(TokenTree(), ()), 4) == []
