"""The loop draft -> verify -> commit: the product itself."""

from __future__ import annotations

from collections.abc import AsyncGenerator
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


NOTHING_DRAFTED = TimedDraft(EMPTY_TREE)


class NoDraft:
    """The drafter of plain decoding."""

    async def draft(self, calibration: Calibration) -> TimedDraft:
        return NOTHING_DRAFTED


async def decode(
    prompt_length: int, budget: TreeBudget, verifier: VerifierSession, drafter: DraftSession
) -> AsyncGenerator[Round, None]:
    """Yield one Round per verdict, from the prompt until the verifier finishes.

    The first tree is empty, so that the first token leaves as soon as the prompt is in the verifier's cache; the
    drafter reads the prompt at the same time. Every verdict extends the committed tokens, calibrates the drafter
    with what was really said, and asks it for the next tree.
    """
    committed_length = prompt_length
    draft = NOTHING_DRAFTED
    while True:
        answer = await verifier.verify(committed_length, draft.tree)
        yield Round(draft, answer)
        if answer.verdict.finish_reason is not None:
            return
        calibration = Calibration(committed_length, answer.verdict.token_ids, budget)
        committed_length += len(answer.verdict.token_ids)
        draft = await drafter.draft(calibration)
