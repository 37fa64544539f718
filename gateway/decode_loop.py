"""The loop draft -> verify -> commit: the product itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from easyspec.speculation.messages import Calibration, DraftTimings, Verdict, VerifyTimings
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree

# Turns of the event loop until a round that has begun has written its first message.
_TURNS_TO_ASK = 2


@dataclass(frozen=True)
class TimedDraft:
    """A tree to verify, and what it cost; `elapsed_ns` is the gateway's own measure, 0 if no draft was asked for.

    `node_sources` are the sources of each node, where the drafter tells.
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
    """One turn of the loop: the tree that was guessed and what the base model said to it, at `ended_ns`."""

    draft: TimedDraft
    answer: TimedVerdict
    ended_ns: int = field(default_factory=time.monotonic_ns, compare=False)


class VerifierSession(Protocol):
    """Decides: its verdicts are the output. Raises EasyspecError, which ends the request."""

    async def verify(self, base_length: int, tree: TokenTree, num_plain_rounds: int) -> TimedVerdict:
        """The verdict on `tree`. So many calls with the empty tree are sure to follow, and are told to the verifier at
        once: it goes on by itself meanwhile."""


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

    def plain_rounds(self) -> int:
        """After a budget of None: how many rounds are to do without a draft as well, before it is asked again."""


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
    guessing earns; if that is enough, the drafter is calibrated with what was really said and asked for the next tree.
    A round begins before the one before is yielded: it goes on while the reader works.
    """
    committed_length, num_plain_rounds = prompt_length, 0
    coming = await _begun(_verified(NOTHING_DRAFTED, verifier, committed_length, num_plain_rounds))
    try:
        while True:
            round_ = await coming
            verdict = round_.answer.verdict
            # Before the next budget is asked for: what this round earned counts for it.
            policy.learn(round_)
            if verdict.finish_reason is not None:
                yield round_
                return
            calibration = None
            if num_plain_rounds > 0:
                num_plain_rounds -= 1
            elif (budget := policy.next_budget()) is not None:
                calibration = Calibration(committed_length, verdict.token_ids, budget)
            else:
                num_plain_rounds = policy.plain_rounds()
            committed_length += len(verdict.token_ids)
            if calibration is not None:
                # Committed before the round begins: verifier and drafter refuse any other base length.
                coming = await _begun(_speculated(calibration, drafter, verifier, committed_length))
            else:
                drafter.skip(verdict.token_ids)
                coming = await _begun(_verified(NOTHING_DRAFTED, verifier, committed_length, num_plain_rounds))
            yield round_
    finally:
        # A reader that leaves closes the generator at a yield, while the next round is under way. Wait for its end, so
        # that no round uses a session that the caller closes next.
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


async def _speculated(
    calibration: Calibration, drafter: DraftSession, verifier: VerifierSession, committed_length: int
) -> Round:
    draft = await drafter.draft(calibration)
    return await _verified(draft, verifier, committed_length, num_plain_rounds=0)


async def _verified(
    draft: TimedDraft, verifier: VerifierSession, committed_length: int, num_plain_rounds: int
) -> Round:
    return Round(draft, await verifier.verify(committed_length, draft.tree, num_plain_rounds))


async def _begun(round_: Coroutine[None, None, Round]) -> asyncio.Task[Round]:
    """The round under way, its first message written. If the caller is cancelled meanwhile, so is the round."""
    task = asyncio.create_task(round_)
    try:
        # The new task runs only when this one gives way to the event loop.
        for _ in range(_TURNS_TO_ASK):
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise
    return task
