"""Drives engines through the gateway's own decode loop, without gRPC in between."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from drafter_service.engine import DrafterEngine
from drafter_service.text_engine import TextDrafterEngine
from easyspec.speculation.messages import (
    Calibration,
    OpenSpeculation,
    OpenVerification,
    TokenLogprobs,
    Verdict,
    VerifyTimings,
)
from easyspec.speculation.parameters import FinishReason, LayerPlanRequest, TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import TokenTree
from gateway.decode_loop import DraftSession, NoDraft, Round, TimedDraft, TimedVerdict, decode
from gateway.speculation.controller import SpeculationController
from gateway.speculation.policy import FixedPolicy
from verifier_service.engine import VerifierEngine

BUDGET = TreeBudget(num_levels=5, width=4, num_nodes=16)


@dataclass
class EngineVerifierSession:
    """A session of the engine, as the decode loop wants it; `coming` are verdicts asked for before their turn."""

    engine: VerifierEngine
    session_id: int
    coming: AsyncIterator[tuple[Verdict, VerifyTimings]] | None = None

    async def verify(self, base_length: int, tree: TokenTree, num_plain_rounds: int) -> TimedVerdict:
        self.coming = self.coming or self.engine.verdicts(self.session_id, base_length, tree, num_plain_rounds)
        verdict, timings = await anext(self.coming)
        assert verdict.base_length == base_length
        if num_plain_rounds == 0:
            self.coming = None
        return TimedVerdict(verdict, timings, elapsed_ns=0)


@dataclass(frozen=True)
class EngineDraftSession:
    """A session of the engine, as the decode loop wants it."""

    engine: DrafterEngine | TextDrafterEngine
    session_id: int

    async def draft(self, calibration: Calibration) -> TimedDraft:
        draft = await self.engine.draft(self.session_id, calibration)
        assert draft.base_length == calibration.base_length + len(calibration.token_ids)
        return TimedDraft(draft.tree, draft.timings, node_sources=draft.node_sources)

    def skip(self, token_ids: Sequence[int]) -> None:
        raise AssertionError("a fixed budget skips nothing")


class GarbageDraftSession:
    """Random trees of any shape; a node carries the true token of its place with probability `skill`."""

    def __init__(self, truth: tuple[int, ...], vocab_size: int, skill: float, seed: int) -> None:
        self._truth, self._vocab_size, self._skill = truth, vocab_size, skill
        self._random = random.Random(seed)

    async def draft(self, calibration: Calibration) -> TimedDraft:
        base_length = calibration.base_length + len(calibration.token_ids)
        token_ids: list[int] = []
        parent_rows: list[int] = []
        depths = [0]
        for _ in range(self._random.randrange(20)):
            parent_row = max(self._random.randrange(len(depths)), self._random.randrange(len(depths)))
            place = base_length + depths[parent_row]
            is_right = place < len(self._truth) and self._random.random() < self._skill
            token_id = self._truth[place] if is_right else self._random.randrange(self._vocab_size)
            if (token_id, parent_row) not in zip(token_ids, parent_rows, strict=True):
                token_ids.append(token_id)
                parent_rows.append(parent_row)
                depths.append(depths[parent_row] + 1)
        return TimedDraft(TokenTree(tuple(token_ids), tuple(parent_rows)))

    def skip(self, token_ids: Sequence[int]) -> None:
        pass


@asynccontextmanager
async def drafting(
    engine: DrafterEngine | TextDrafterEngine,
    request: OpenVerification,
    plan: LayerPlanRequest = LayerPlanRequest(),
    sources: DraftSources | None = DraftSources.MODEL,
) -> AsyncIterator[EngineDraftSession]:
    """A drafting session for `request`, told as much as the gateway would tell."""
    committed = request.prompt_token_ids + request.output_token_ids
    most = None if request.stop.max_tokens is None else len(request.prompt_token_ids) + request.stop.max_tokens
    session_id = await engine.open(
        OpenSpeculation(
            committed,
            request.sampling,
            plan,
            max_total_length=most,
            sources=sources,
            num_output_tokens=len(request.output_token_ids),
        )
    )
    try:
        yield EngineDraftSession(engine, session_id)
    finally:
        engine.close(session_id)


@dataclass(frozen=True)
class Output:
    """What a request came to; `rounds` tells how."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    matched_stop_token_id: int | None
    rounds: tuple[Round, ...]

    @property
    def said(self) -> tuple[object, ...]:
        """What must not depend on the drafter."""
        return self.token_ids, self.finish_reason, self.matched_stop_token_id

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """One entry per token of the rounds, if asked for; these must not depend on the drafter either."""
        return tuple(entry for round_ in self.rounds for entry in round_.answer.verdict.logprobs)

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """The prompt's own, if asked for."""
        return self.rounds[0].answer.verdict.prompt_logprobs

    @property
    def num_accepted(self) -> int:
        return sum(round_.answer.verdict.num_accepted for round_ in self.rounds)

    @property
    def trees(self) -> list[TokenTree]:
        return [round_.draft.tree for round_ in self.rounds]


async def generate(
    verifier: VerifierEngine,
    request: OpenVerification,
    drafts: DraftSession | None = None,
    budget: TreeBudget = BUDGET,
) -> Output:
    """Decode `request` to its end; without `drafts`, plainly. Tokens emitted before are part of the output."""
    session_id = await verifier.open(request)
    base_length = len(request.prompt_token_ids) + len(request.output_token_ids)
    session = EngineVerifierSession(verifier, session_id)
    try:
        async with aclosing(
            decode(base_length, FixedPolicy(SpeculationController(budget), budget), session, drafts or NoDraft())
        ) as rounds:
            taken = tuple([round_ async for round_ in rounds])
    finally:
        verifier.close(session_id)
    verdicts = [round_.answer.verdict for round_ in taken]
    token_ids = request.output_token_ids + tuple(token_id for verdict in verdicts for token_id in verdict.token_ids)
    return Output(token_ids, verdicts[-1].finish_reason, verdicts[-1].matched_stop_token_id, taken)
