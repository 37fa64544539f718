"""The decode loop over scripted sessions: what is asked, when, and what is asked ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from easyspec.errors import UnavailableError
from easyspec.speculation.messages import Calibration, Verdict, VerifyTimings
from easyspec.speculation.parameters import FinishReason, TreeBudget
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from gateway.decode_loop import Round, TimedDraft, TimedVerdict, decode

BUDGET = TreeBudget(num_levels=1, width=1, num_nodes=1)


@dataclass
class ScriptedPolicy:
    """Budgets in order, None for good behind the last; every plain round brings `num_ahead` more."""

    budgets: list[TreeBudget | None] = field(default_factory=list)
    num_ahead: int = 0
    learned: list[Round] = field(default_factory=list)
    num_asked: int = 0

    def learn(self, round_: Round) -> None:
        self.learned.append(round_)

    def next_budget(self) -> TreeBudget | None:
        self.num_asked += 1
        return self.budgets.pop(0) if self.budgets else None

    def plain_rounds(self) -> int:
        return self.num_ahead


@dataclass
class CountingVerifier:
    """Says the position for a token and accepts every tree of one node; `length` is the output's end."""

    length: int = 1000
    error_at: int | None = None
    asked: list[tuple[int, int, int]] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def verify(self, base_length: int, tree: TokenTree, num_plain_rounds: int) -> TimedVerdict:
        self.asked.append((base_length, len(tree), num_plain_rounds))
        if self.gate is not None:
            await self.gate.wait()
        if self.error_at == base_length:
            raise UnavailableError("lost")
        token_ids = tuple(range(base_length, base_length + 1 + len(tree)))
        reason = FinishReason.LENGTH if token_ids[-1] + 1 >= self.length else None
        verdict = Verdict(base_length, token_ids, tuple(range(1, len(tree) + 1)), reason)
        return TimedVerdict(verdict, VerifyTimings(0, 0, 1, 1), 1)


@dataclass
class OneNodeDrafter:
    calibrations: list[Calibration] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    async def draft(self, calibration: Calibration) -> TimedDraft:
        self.calibrations.append(calibration)
        return TimedDraft(TokenTree((calibration.base_length + len(calibration.token_ids),), (0,)))

    def skip(self, token_ids: Sequence[int]) -> None:
        self.skipped.extend(token_ids)


async def test_plain_rounds_are_told_ahead_and_the_policy_is_asked_behind_them() -> None:
    policy, verifier, drafter = ScriptedPolicy([], num_ahead=3), CountingVerifier(length=12), OneNodeDrafter()
    async with aclosing(decode(3, policy, verifier, drafter)) as rounds:
        tokens = [token for round_ in [one async for one in rounds] for token in round_.answer.verdict.token_ids]
    assert tokens == [*range(3, 12)]
    assert [ahead for _, _, ahead in verifier.asked] == [0, 3, 2, 1, 0, 3, 2, 1, 0]
    assert policy.num_asked == 2
    assert drafter.skipped == [*range(3, 11)]
    assert len(policy.learned) == 9


async def test_drafted_rounds_calibrate_with_all_that_was_said() -> None:
    policy, verifier, drafter = ScriptedPolicy([BUDGET, BUDGET, None, BUDGET]), CountingVerifier(11), OneNodeDrafter()
    async with aclosing(decode(3, policy, verifier, drafter)) as rounds:
        lengths = [len(round_.answer.verdict.token_ids) async for round_ in rounds]
    assert lengths == [1, 2, 2, 1, 2]
    assert [(one.base_length, one.token_ids) for one in drafter.calibrations] == [
        (3, (3,)),
        (4, (4, 5)),
        (8, (8,)),
    ]
    assert verifier.asked == [(3, 0, 0), (4, 1, 0), (6, 1, 0), (8, 0, 0), (9, 1, 0)]


async def test_a_round_begins_while_the_one_before_is_read() -> None:
    verifier = CountingVerifier()
    async with aclosing(decode(3, ScriptedPolicy(), verifier, OneNodeDrafter())) as rounds:
        await anext(rounds)
        assert verifier.asked == [(3, 0, 0), (4, 0, 0)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(verifier.asked) == 2, "one round ahead of the reader, no more"


async def test_leaving_ends_the_round_under_way() -> None:
    verifier = CountingVerifier()
    rounds = decode(3, ScriptedPolicy(), verifier, OneNodeDrafter())
    await anext(rounds)
    verifier.gate = asyncio.Event()
    await anext(rounds)
    before = asyncio.all_tasks()
    await rounds.aclose()
    assert asyncio.all_tasks() < before


async def test_an_error_comes_behind_what_was_said_before_it() -> None:
    verifier = CountingVerifier(error_at=5)
    rounds = decode(3, ScriptedPolicy(), verifier, OneNodeDrafter())
    assert [(await anext(rounds)).answer.verdict.token_ids for _ in range(2)] == [(3,), (4,)]
    with pytest.raises(UnavailableError, match="lost"):
        await anext(rounds)


async def test_the_first_round_has_no_tree() -> None:
    verifier = CountingVerifier(length=4)
    rounds = [one async for one in decode(3, ScriptedPolicy([BUDGET]), verifier, OneNodeDrafter())]
    assert [one.draft.tree for one in rounds] == [EMPTY_TREE]


@pytest.mark.parametrize("num_turns", range(8))
async def test_a_reader_that_is_cancelled_leaves_no_round_behind(num_turns: int) -> None:
    verifier = CountingVerifier(gate=asyncio.Event())

    async def read() -> None:
        async with aclosing(decode(3, ScriptedPolicy(), verifier, OneNodeDrafter())) as rounds:
            async for _ in rounds:
                pass

    reader = asyncio.create_task(read())
    for _ in range(num_turns):
        await asyncio.sleep(0)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}
