"""Rounds that text drafts at a better rate are drafted by text alone, and the model catches up."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest

from drafter_service.drafter import Drafter, DrafterLimits
from drafter_service.fusion.fused_drafting import FusedDrafting
from drafter_service.fusion.fusing import FusingSource
from drafter_service.fusion.model_use import ModelGains, ModelUse
from drafter_service.fusion.text_use import TextUse
from drafter_service.source import DraftJob
from drafter_service.text.guessers import TextResources
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources
from tests.drafter_service.core_driver import BUDGET, MAX_TREE_NODES, SAMPLED, CoreDriver

PROMPT = (5, 8, 13, 21, 34, 55) * 6
MODEL_S, TEXT_S, REST_S = 0.015, 0.001, 0.025


class Scripted(ModelUse):
    """Decides as it is told, and remembers what it was told of rounds."""

    def __init__(self, decisions: Iterable[bool]) -> None:
        super().__init__(ModelGains())
        self._decisions = iter(decisions)
        self.observed: list[tuple[int, int | None]] = []

    def is_worth_it(self, expected_of_text: float) -> bool:
        assert expected_of_text > 1.0  # the prompt repeats itself
        return next(self._decisions)

    def observe(self, expected_of_text: float, num_of_text: int, num_tokens: int | None) -> None:
        assert expected_of_text > 1.0
        self.observed.append((num_of_text, num_tokens))


def fusing(core: CoreDriver, model_use: ModelUse, *, is_everybody_asked: bool = False) -> CoreDriver:
    """The same model and memory, text beside it."""
    fused = FusedDrafting(TextResources())
    fused.model_use = lambda session_id: model_use  # type: ignore[method-assign]
    source = FusingSource(core.source, fused, is_everybody_asked=is_everybody_asked)
    limits = DrafterLimits("draft", core.drafter.max_model_len, MAX_TREE_NODES, TEXT_SOURCES | DraftSources.MODEL)
    decoder = core.source._decoder
    drafter = Drafter(decoder.config, core.memory, source, decoder.sequential_plan, limits)
    drafter._session_ids = itertools.count(1_000_000)  # the source knows the core's own sessions by theirs
    return CoreDriver(drafter, core.source, core.memory)


def test_the_model_catches_up_after_rounds_without_it(core: CoreDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[DraftJob] = []
    begin = core.source.begin
    monkeypatch.setattr(core.source, "begin", lambda job: (jobs.append(job), begin(job)))
    decisions = [True, False, False, True, False, True]
    model_use = Scripted(decisions)
    driver = fusing(core, model_use)
    session_id = driver.open(PROMPT, SAMPLED)
    tokens, said, brought = list(PROMPT), (5, 8), []
    for has_model in decisions:
        (draft,) = driver.finish([driver.ask(session_id, len(tokens), said, BUDGET)])
        tokens += said
        assert len(draft.tree) > 0
        assert (draft.timings.calibrate_ns > 0) is has_model
        path = draft.tree.path_rows(len(draft.tree))
        said = (*(draft.tree.token_ids[row - 1] for row in path), 8)  # the prompt knows what follows it
        brought.append((len(said), has_model))
    assert [number for of_text, number in model_use.observed if number is not None] == [
        n for n, has in brought[:-1] if has
    ]
    assert [of_text for of_text, number in model_use.observed if number is None] == [n for n, has in brought if not has]
    assert [number is not None for _, number in model_use.observed] == decisions[:-1]
    # The first job has the two tokens before the loop's; the last one has those of the round that it sat out, too.
    given = [2, *(count for count, _ in brought)]
    assert [job.num_new_tokens for job in jobs] == [given[0], sum(given[1:4]), sum(given[4:6])]
    fresh_id = core.open(tokens[:-1])
    core.draft(fresh_id, len(tokens) - 1, tokens[-1:])
    difference = (driver.kv(session_id, len(tokens)) - core.kv(fresh_id, len(tokens))).abs().max().item()
    assert difference < 1e-5
    driver.close(session_id)
    core.close(fresh_id)


def test_a_round_of_the_model_says_how_far_text_alone_would_have_come(core: CoreDriver) -> None:
    budget = replace(BUDGET, num_nodes=60)
    model_use = Scripted([True, True])
    driver = fusing(core, model_use)
    prompt = (*range(10, 30), 5, 8, 13)  # of which 5, 8 comes back, so that text expects a little
    session_id = driver.open(prompt, SAMPLED)
    (draft,) = driver.finish([driver.ask(session_id, len(prompt), (5, 8), budget)])
    row = 1 + next(i for i, sources in enumerate(draft.node_sources) if sources == DraftSources.MODEL)
    path = draft.tree.path_rows(row)
    said = (*(draft.tree.token_ids[each - 1] for each in path), 8)
    driver.finish([driver.ask(session_id, len(prompt) + 2, said, budget)])
    ((num_of_text, num_tokens),) = model_use.observed
    assert num_tokens == len(said)
    assert num_of_text < num_tokens
    driver.close(session_id)


def test_everybody_is_asked_where_that_is_asked_for(core: CoreDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would pay."""
    model_use = Scripted([])
    monkeypatch.setattr(TextUse, "is_worth_it", lambda self, num_sharing: False)
    driver = fusing(core, model_use, is_everybody_asked=True)
    session_id = driver.open(PROMPT, SAMPLED)
    for length in range(len(PROMPT), len(PROMPT) + 10, 2):
        (draft,) = driver.finish([driver.ask(session_id, length, (5, 8), BUDGET)])
        assert draft.timings.calibrate_ns > 0, "the model drafted"
        assert any(sources & TEXT_SOURCES for sources in draft.node_sources)
    assert len(model_use.observed) == 4, "what it learns goes on"
    driver.close(session_id)


def round_of(model_use: ModelUse, expected_of_text: float, num_of_text: int, num_with_model: int) -> bool:
    """Whether the model is asked; the request learns what the round came to."""
    has_model = model_use.is_worth_it(expected_of_text)
    model_use.drafted(MODEL_S if has_model else TEXT_S, has_model=has_model)
    model_use.returned(REST_S)
    model_use.observe(expected_of_text, num_of_text, num_with_model if has_model else None)
    return has_model


@pytest.mark.parametrize(
    ("tokens_with_model", "tokens_of_text", "is_asked"), [(4, 2, True), (4, 3, False), (9, 7, False), (9, 3, True)]
)
def test_the_better_rate_wins(tokens_with_model: int, tokens_of_text: int, is_asked: bool) -> None:
    """A round with the model takes 40 ms, one without 26."""
    model_use = ModelUse(ModelGains())
    rounds = [round_of(model_use, tokens_of_text, tokens_of_text, tokens_with_model) for _ in range(400)]
    share = sum(rounds) / len(rounds)
    assert share > 0.97 if is_asked else share < 0.07


def test_what_it_learned_does_not_stay_for_ever() -> None:
    model_use = ModelUse(ModelGains())

    def asked(tokens_with_model: int, num_rounds: int) -> int:
        return sum(round_of(model_use, 3.0, 3, tokens_with_model) for _ in range(num_rounds))

    assert asked(tokens_with_model=3, num_rounds=200) < 20
    asked(tokens_with_model=8, num_rounds=3000)
    assert asked(tokens_with_model=8, num_rounds=100) > 90


def test_a_request_that_the_model_does_not_help_stops_asking_it_soon() -> None:
    """Of others it is known that the model brings much at such rounds."""
    shared = ModelGains()
    others = ModelUse(shared)
    for _ in range(200):
        assert round_of(others, 5.0, 4, 8)
    copying = ModelUse(shared)
    rounds = [round_of(copying, 5.0, 9, 9) for _ in range(20)]
    assert sum(rounds) <= 8
    assert not any(rounds[10:])
    assert sum(round_of(others, 5.0, 4, 8) for _ in range(20)) == 20


def test_a_request_that_is_out_of_the_ordinary_is_asked_again_though_others_never_stop() -> None:
    shared = ModelGains()
    others, copying = ModelUse(shared), ModelUse(shared)
    for _ in range(100):
        round_of(others, 5.0, 4, 8)
    asked = []
    for _ in range(600):
        round_of(others, 5.0, 4, 8)
        asked.append(round_of(copying, 5.0, 9, 9))
    assert 1 <= sum(asked[100:]) <= 20


def test_a_silent_client_is_not_a_slow_verifier() -> None:
    shared = ModelGains()
    model_use = ModelUse(shared)
    for _ in range(20):
        model_use.returned(REST_S)
    model_use.returned(3600.0)
    assert shared.rest_s.value < 2 * REST_S
