"""Rounds that leave out the draft model, or text: each catches up, and hears what it would have come to."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace

from drafter_service.drafter import Drafter
from drafter_service.fusion.rounds import Rounds
from drafter_service.request import DrafterLimits
from drafter_service.worth import Choice, ModelAlone, TokenTime
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources
from tests.drafter_service.core_driver import BUDGET, MAX_TREE_NODES, SAMPLED, CoreDriver

PROMPT = (5, 8, 13, 21, 34, 55) * 6


def fusing(core: CoreDriver, *, asks_all_sources: bool = False) -> CoreDriver:
    """The same model and memory, text beside it."""
    decoder, sources = core.model.decoder, TEXT_SOURCES | DraftSources.MODEL
    limits = DrafterLimits(
        "draft",
        decoder.config.vocab_size,
        core.drafter.max_model_len,
        MAX_TREE_NODES,
        decoder.sequential_plan,
        sources,
    )
    drafter = Drafter(limits, Rounds(asks_all_sources=asks_all_sources), model=core.model)
    return replace(core, drafter=drafter)


class ScriptedChoice(Choice):
    """Decides what it is told to, and remembers the gains that it was told of."""

    def __init__(self, decisions: Iterable[bool]) -> None:
        self.remaining = iter(decisions)
        self.gains: list[float] = []

    def is_worth_it(self, kind: int = 0, num_sharing: int = 1) -> bool:
        return next(self.remaining)

    def observe(self, gain: float, time_s: float, kind: int = 0) -> None:
        self.gains.append(gain)


def open_scripted(
    driver: CoreDriver, prompt: Sequence[int], model: Iterable[bool], text: Iterable[bool]
) -> tuple[int, ScriptedChoice, ScriptedChoice]:
    """A session, and its choices about model and text."""
    session_id = driver.open(prompt, SAMPLED)
    choices = driver.drafter._sessions[session_id].choices
    choices.model, choices.text = scripted = ScriptedChoice(model), ScriptedChoice(text)
    return session_id, *scripted


def test_the_model_catches_up_after_rounds_without_it(core: CoreDriver) -> None:
    decisions = [True, False, False, True, False, True]
    driver = fusing(core)
    session_id, model, _ = open_scripted(driver, PROMPT, decisions, itertools.repeat(True))
    tokens, said = list(PROMPT), (5, 8)
    for has_model in decisions:
        (draft,) = driver.finish([driver.ask(session_id, len(tokens), said, BUDGET)])
        tokens += said
        assert len(draft.tree) > 0
        assert (draft.timings.calibrate_ns > 0) is has_model
        path = draft.tree.path_rows(len(draft.tree))
        said = (*(draft.tree.token_ids[row - 1] for row in path), 8)  # the prompt knows what follows it
    assert len(model.gains) == sum(decisions[:-1]), "of rounds that both drafted and that another one followed"
    fresh_id = core.open(tokens[:-1])
    core.draft(fresh_id, len(tokens) - 1, tokens[-1:])
    difference = (driver.kv(session_id, len(tokens)) - core.kv(fresh_id, len(tokens))).abs().max().item()
    assert difference < 1e-5
    driver.close(session_id)
    core.close(fresh_id)


def test_text_reads_on_in_rounds_without_it(core: CoreDriver) -> None:
    """What it retrieves says how much there is in asking it."""
    decisions = [True, False, False, True, True]
    driver = fusing(core)
    session_id, _, _ = open_scripted(driver, PROMPT, itertools.repeat(True), decisions)
    text = driver.drafter._sessions[session_id].text
    assert text is not None
    tokens = list(PROMPT)
    for has_text in decisions:
        (draft,) = driver.finish([driver.ask(session_id, len(tokens), (5, 8), BUDGET)])
        tokens += (5, 8)
        assert all(sources == DraftSources.MODEL for sources in draft.node_sources) is not has_text
        assert text.num_read == len(tokens)
    driver.close(session_id)


def test_rounds_of_text_alone_count_for_text_what_the_model_would_have_taken(core: CoreDriver) -> None:
    driver = fusing(core)
    session_id, _, text = open_scripted(driver, PROMPT, [True, False, False, False], itertools.repeat(True))
    choices = driver.drafter._sessions[session_id].choices
    tokens, verdicts = list(PROMPT), [(5, 8), (13, 21), (34, 55)]
    for said in verdicts:
        driver.finish([driver.ask(session_id, len(tokens), said, BUDGET)])
        tokens += said
    choices.token_time, choices.model_alone = TokenTime(), ModelAlone()
    choices.model_alone.observe(0, 1, 30.0)
    driver.finish([driver.ask(session_id, len(tokens), (13,), BUDGET)])
    assert text.gains[-1] > 0, "one token, where the model would have come to one as well, half a minute later"
    driver.close(session_id)


def test_ngrams_leave_the_field_to_retrieval_where_they_bring_nothing(core: CoreDriver) -> None:
    driver = fusing(core)
    session_id, _, _ = open_scripted(driver, PROMPT, itertools.repeat(False), itertools.repeat(True))
    session = driver.drafter._sessions[session_id]
    session.choices.ngrams = ngrams = ScriptedChoice([True, False, True])
    tokens = list(PROMPT)
    for said, has_ngrams in (((5, 8), True), ((13, 21), False), ((34, 55), True)):
        (draft,) = driver.finish([driver.ask(session_id, len(tokens), said, BUDGET)])
        tokens += said
        named = functools.reduce(operator.or_, draft.node_sources)
        assert (DraftSources.NGRAM in named) is has_ngrams
        assert DraftSources.RETRIEVAL in named
    assert ngrams.gains == [0.0], "of the first round: retrieval had named what they did"
    driver.close(session_id)


def test_a_round_says_how_far_either_would_have_come_alone(core: CoreDriver) -> None:
    driver = fusing(core, asks_all_sources=True)
    prompt = (*range(10, 30), 5, 8, 13)  # of which 5, 8 comes back, so that text expects a little
    session_id, model, text = open_scripted(driver, prompt, (), ())
    (draft,) = driver.finish([driver.ask(session_id, len(prompt), (5, 8), replace(BUDGET, num_nodes=60))])
    row = 1 + next(i for i, sources in enumerate(draft.node_sources) if sources == DraftSources.MODEL)
    said = (*(draft.tree.token_ids[each - 1] for each in draft.tree.path_rows(row)), 8)
    driver.finish([driver.ask(session_id, len(prompt) + 2, said, BUDGET)])
    assert model.gains[0] > 0, "text alone had not come so far"
    assert text.gains[0] == 0, "the model alone had"
    driver.close(session_id)


def test_everybody_is_asked_where_that_is_asked_for(core: CoreDriver) -> None:
    """Whatever would pay."""
    driver = fusing(core, asks_all_sources=True)
    session_id, model, of_text = open_scripted(driver, PROMPT, itertools.repeat(False), itertools.repeat(False))
    for length in range(len(PROMPT), len(PROMPT) + 10, 2):
        (draft,) = driver.finish([driver.ask(session_id, length, (5, 8), BUDGET)])
        assert draft.timings.calibrate_ns > 0, "the model drafted"
        assert any(sources & TEXT_SOURCES for sources in draft.node_sources)
    assert len(model.gains) == len(of_text.gains) == 4, "what they learn goes on"
    driver.close(session_id)
