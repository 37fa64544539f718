"""The loop draft -> verify -> commit: the product itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from easyspec.speculation.messages import Calibration, DraftTimings, Verdict, VerifyTimings
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree


@dataclass(frozen=True)
class TimedDraft:
    """A tree to verify, and what it cost; `elapsed_ns` is the gateway's own measure, 0 if nobody was asked.

    `node_sources` says who guessed each node, where the drafter tells.
    """

    tree: TokenTree
    timings: DraftTimings = field(default_factory=DraftTimings)
    elapsed_ns: int = 0
    node_sources: tuple[DraftSources, ...] = ()


@dataclass(frozen=True)
class TimedVerdict:
    """The verdict on a tree, and what it cost; `elapsed_ns` is the gateway's own measure."""

    verdict: Verdict
    timings: VerifyTimings
    elapsed_ns: int


@dataclass(frozen=True)
class Round:
    """One turn of the loop: the tree that was guessed and what the base model said to it."""

    draft: TimedDraft
    answer: TimedVerdict


class VerifierSession(Protocol):
    """Decides: its verdicts are the output. Raises EasyspecError, which ends the request."""

    async def verify(self, base_length: int, tree: TokenTree) -> TimedVerdict: ...


class DraftSession(Protocol):
    """Guesses: never raises EasyspecError, for want of a better guess it returns the empty tree."""

    async def draft(self, calibration: Calibration) -> TimedDraft: ...

    def skip(self, token_ids: Sequence[int]) -> None:
        """These tokens were committed and no draft is wanted after them: the drafter is not asked."""


class BudgetPolicy(Protocol):
    """Says how much to speculate, round by round; what it says changes the speed, never the tokens."""

    def learn(self, round_: Round) -> None: ...

    def next_budget(self) -> TreeBudget | None:
        """The size of the next tree; None if a draft would cost more than it brings."""


NOTHING_DRAFTED = TimedDraft(EMPTY_TREE)


class NoDraft:
    """The drafter of plain decoding."""

    async def draft(self, calibration: Calibration) -> TimedDraft:
        return NOTHING_DRAFTED

    def skip(self, token_ids: Sequence[int]) -> None:
        pass


async def decode(
    prompt_length: int, policy: BudgetPolicy, verifier: VerifierSession, drafter: DraftSession
) -> AsyncGenerator[Round, None]:
    """Yield one Round per verdict, from the prompt until the verifier finishes.

    The first tree is empty, so that the first token leaves as soon as the prompt is in the verifier's cache; the
    drafter reads the prompt at the same time. Every verdict extends the committed tokens and teaches the policy what
    guessing earns; if that is enough, it calibrates the drafter with what was really said and asks for the next tree.
    """
    committed_length = prompt_length
    draft = NOTHING_DRAFTED
    while True:
        answer = await verifier.verify(committed_length, draft.tree)
        round_ = Round(draft, answer)
        policy.learn(round_)
        yield round_
        if answer.verdict.finish_reason is not None:
            return
        token_ids, budget = answer.verdict.token_ids, policy.next_budget()
        if budget is None:
            drafter.skip(token_ids)
            draft = NOTHING_DRAFTED
        else:
            draft = await drafter.draft(Calibration(committed_length, token_ids, budget))
        committed_length += len(token_ids)
