"""Text rests in rounds of the model where it brings less than its work costs, and catches up when it looks again."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest

from drafter_service.drafter import Drafter, DrafterLimits
from drafter_service.fusion.fused_drafting import FusedDrafting
from drafter_service.fusion.fusing import FusingSource
from drafter_service.fusion.model_use import ModelGains, ModelUse
from drafter_service.fusion.text_use import TextGains, TextUse, tokens_by
from drafter_service.text.guessers import TextResources
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources
from easyspec.speculation.token_tree import TokenTree
from tests.drafter_service.core_driver import BUDGET, GREEDY, MAX_TREE_NODES, CoreDriver

PROMPT = (5, 8, 13, 21, 34, 55) * 6
WORK_S, ROUND_S = 0.003, 0.045


def share_of_looks(gain_of_round: Callable[[int], int], num_rounds: int = 2000, *, num_sharing: int = 1) -> float:
    """Of the later half of a request's rounds: how many asked text, if it then brings these gains over 4 tokens."""
    shared = TextGains()
    use = TextUse(shared)
    asked = []
    for index in range(num_rounds):
        asked.append(use.is_worth_it(num_sharing))
        if asked[-1]:
            use.observe(4 + gain_of_round(index), 4)
            shared.took(WORK_S, ROUND_S)
    later = asked[num_rounds // 2 :]
    return sum(later) / len(later)


def test_text_that_brings_nothing_rests_and_text_that_pays_is_asked_always() -> None:
    assert share_of_looks(lambda index: 0) < 0.1
    assert share_of_looks(lambda index: index % 5 == 0) < 0.5  # 5 % of the tokens for 7 % of the time
    assert share_of_looks(lambda index: index % 2) == 1.0


def test_work_that_others_wait_for_counts_for_them_too() -> None:
    assert share_of_looks(lambda index: index % 2, num_sharing=8) < 0.5


def test_a_request_whose_text_begins_to_repeat_is_found_again() -> None:
    assert share_of_looks(lambda index: 3 * (index > 700)) > 0.9


def test_what_many_requests_have_shown_spares_a_new_one_the_looking() -> None:
    shared = TextGains()
    for _ in range(20):
        use = TextUse(shared)
        for _ in range(40):
            if use.is_worth_it(1):
                use.observe(4, 4)
                shared.took(WORK_S, ROUND_S)
    use = TextUse(shared)
    assert [use.is_worth_it(1) for _ in range(16)] == [False] * 16
    assert use.is_worth_it(1), "but it looks after a while"


def test_tokens_that_a_tree_would_have_brought() -> None:
    tree = TokenTree((7, 8, 9), (0, 0, 1))
    assert [tokens_by(tree, token_ids) for token_ids in ((5,), (8, 3), (7, 3), (7, 9, 4), (7, 9))] == [1, 2, 2, 3, 3]


class Scripted(TextUse):
    """Decides as it is told, and remembers what it was told of rounds."""

    def __init__(self, decisions: Iterable[bool]) -> None:
        super().__init__(TextGains())
        self._decisions = iter(decisions)
        self.observed: list[tuple[int, int]] = []

    def is_worth_it(self, num_sharing: int) -> bool:
        return next(self._decisions)

    def observe(self, num_tokens: int, num_without: int) -> None:
        self.observed.append((num_tokens, num_without))


class AlwaysWithModel(ModelUse):
    def is_worth_it(self, expected_of_text: float) -> bool:
        return True


def test_text_catches_up_after_rounds_without_it(core: CoreDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    decisions = [True, False, False, True, True]
    text_use = Scripted(decisions)
    fused = FusedDrafting(TextResources())
    monkeypatch.setattr(fused, "text_use", lambda session_id: text_use)
    monkeypatch.setattr(fused, "model_use", lambda session_id: AlwaysWithModel(ModelGains()))
    heard: list[int] = list(PROMPT)
    begin = fused.begin
    monkeypatch.setattr(fused, "begin", lambda session_id, tokens: (heard.extend(tokens), begin(session_id, tokens))[1])
    source = FusingSource(core.source, fused)
    limits = DrafterLimits("draft", core.drafter.max_model_len, MAX_TREE_NODES, TEXT_SOURCES | DraftSources.MODEL)
    decoder = core.source._decoder
    drafter = Drafter(decoder.config, core.memory, source, decoder.sequential_plan, limits)
    drafter._session_ids = itertools.count(2_000_000)  # the source knows the core's own sessions by theirs
    driver = CoreDriver(drafter, core.source, core.memory)
    session_id = driver.open(PROMPT, GREEDY)
    tokens, alone = list(PROMPT), []
    for has_text in decisions:
        (draft,) = driver.finish([driver.ask(session_id, len(tokens), (5, 8), BUDGET)])
        tokens += (5, 8)
        named = DraftSources.MODEL
        for sources in draft.node_sources:
            named |= sources
        alone.append(named == DraftSources.MODEL)
        assert heard == tokens if has_text else heard != tokens
    assert alone == [not has_text for has_text in decisions]
    # Told of the rounds that both drafted and that another one followed.
    assert len(text_use.observed) == 2
    assert all(num_tokens == 2 and 1 <= num_without <= 3 for num_tokens, num_without in text_use.observed)
    driver.close(session_id)
    assert not source._rounds
    assert not source._num_unheard
