"""Rounds that leave out the draft model, or text: each catches up, and hears what it would have come to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from drafter_service.drafter import Drafter
from drafter_service.fusion.fused_drafting import FusedDrafting
from drafter_service.fusion.learned import RoundChoices
from drafter_service.fusion.rounds import Rounds
from drafter_service.limits import DrafterLimits
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources
from tests.drafter_service.core_driver import BUDGET, MAX_TREE_NODES, SAMPLED, CoreDriver

PROMPT = (5, 8, 13, 21, 34, 55) * 6


def fusing(core: CoreDriver, *, asks_all_sources: bool = False) -> CoreDriver:
    """The same model and memory, text beside it."""
    limits = DrafterLimits("draft", core.drafter.max_model_len, MAX_TREE_NODES, TEXT_SOURCES | DraftSources.MODEL)
    decoder = core.model.decoder
    rounds = Rounds(asks_all_sources=asks_all_sources)
    drafter = Drafter(decoder.config, core.memory, core.model, rounds, decoder.sequential_plan, limits)
    return replace(core, drafter=drafter)


def script(monkeypatch: pytest.MonkeyPatch, name: str, decisions: Iterable[bool]) -> None:
    remaining = iter(decisions)
    monkeypatch.setattr(RoundChoices, name, lambda self, number: next(remaining))


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Gains that the rounds were told of."""
    gains: dict[str, list[float]] = {"model": [], "text": []}
    monkeypatch.setattr(RoundChoices, "observe_model", lambda self, expected, gain, time_s: gains["model"].append(gain))
    monkeypatch.setattr(RoundChoices, "observe_text", lambda self, gain, time_s: gains["text"].append(gain))
    return gains


def test_the_model_catches_up_after_rounds_without_it(
    core: CoreDriver, monkeypatch: pytest.MonkeyPatch, observed: dict[str, list[float]]
) -> None:
    decisions = [True, False, False, True, False, True]
    script(monkeypatch, "is_model_worth_it", decisions)
    driver = fusing(core)
    session_id = driver.open(PROMPT, SAMPLED)
    tokens, said = list(PROMPT), (5, 8)
    for has_model in decisions:
        (draft,) = driver.finish([driver.ask(session_id, len(tokens), said, BUDGET)])
        tokens += said
        assert len(draft.tree) > 0
        assert (draft.timings.calibrate_ns > 0) is has_model
        path = draft.tree.path_rows(len(draft.tree))
        said = (*(draft.tree.token_ids[row - 1] for row in path), 8)  # the prompt knows what follows it
    assert len(observed["model"]) == sum(decisions[:-1]), "of rounds that both drafted and that another one followed"
    fresh_id = core.open(tokens[:-1])
    core.draft(fresh_id, len(tokens) - 1, tokens[-1:])
    difference = (driver.kv(session_id, len(tokens)) - core.kv(fresh_id, len(tokens))).abs().max().item()
    assert difference < 1e-5
    driver.close(session_id)
    core.close(fresh_id)


def test_text_catches_up_after_rounds_without_it(core: CoreDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    decisions = [True, False, False, True, True]
    script(monkeypatch, "is_text_worth_it", decisions)
    monkeypatch.setattr(RoundChoices, "is_model_worth_it", lambda self, expected: True)
    driver = fusing(core)
    session_id = driver.open(PROMPT, SAMPLED)
    text = driver.drafter._sessions[session_id].text
    assert isinstance(text, FusedDrafting)
    tokens = list(PROMPT)
    for has_text in decisions:
        (draft,) = driver.finish([driver.ask(session_id, len(tokens), (5, 8), BUDGET)])
        tokens += (5, 8)
        assert all(sources == DraftSources.MODEL for sources in draft.node_sources) is not has_text
        assert (text._num_read == len(tokens)) is has_text
    driver.close(session_id)


def test_a_round_says_how_far_either_would_have_come_alone(
    core: CoreDriver, monkeypatch: pytest.MonkeyPatch, observed: dict[str, list[float]]
) -> None:
    driver = fusing(core, asks_all_sources=True)
    prompt = (*range(10, 30), 5, 8, 13)  # of which 5, 8 comes back, so that text expects a little
    session_id = driver.open(prompt, SAMPLED)
    (draft,) = driver.finish([driver.ask(session_id, len(prompt), (5, 8), replace(BUDGET, num_nodes=60))])
    row = 1 + next(i for i, sources in enumerate(draft.node_sources) if sources == DraftSources.MODEL)
    said = (*(draft.tree.token_ids[each - 1] for each in draft.tree.path_rows(row)), 8)
    driver.finish([driver.ask(session_id, len(prompt) + 2, said, BUDGET)])
    assert observed["model"][0] > 0, "text alone had not come so far"
    assert observed["text"][0] == 0, "the model alone had"
    driver.close(session_id)


def test_everybody_is_asked_where_that_is_asked_for(
    core: CoreDriver, monkeypatch: pytest.MonkeyPatch, observed: dict[str, list[float]]
) -> None:
    """Whatever would pay."""
    monkeypatch.setattr(RoundChoices, "is_text_worth_it", lambda self, num_sharing: False)
    monkeypatch.setattr(RoundChoices, "is_model_worth_it", lambda self, expected: False)
    driver = fusing(core, asks_all_sources=True)
    session_id = driver.open(PROMPT, SAMPLED)
    for length in range(len(PROMPT), len(PROMPT) + 10, 2):
        (draft,) = driver.finish([driver.ask(session_id, length, (5, 8), BUDGET)])
        assert draft.timings.calibrate_ns > 0, "the model drafted"
        assert any(sources & TEXT_SOURCES for sources in draft.node_sources)
    assert len(observed["model"]) == len(observed["text"]) == 4, "what they learn goes on"
    driver.close(session_id)
