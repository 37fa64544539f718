"""Engines without a model: text is a fixed function of the tokens before, so that every test can foretell it.

Each has gates (events that hold an operation up) and faults (exceptions that it raises instead).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from easyspec.errors import PromptTooLongError, StalePositionError, UnknownModelError
from easyspec.speculation.messages import (
    Calibration,
    Draft,
    DraftTimings,
    KvUsage,
    ModelInfo,
    OpenSpeculation,
    OpenVerification,
    Verdict,
    VerifyTimings,
)
from easyspec.speculation.parameters import FinishReason, LayerPlanRequest, MlpPlacement, StopConditions
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree

NUM_SLOTS = 1024


def next_token(token_ids: Sequence[int], vocab_size: int) -> int:
    """What the fake base model says after `token_ids`; never token 0, the end of sequence."""
    return 1 + (31 * token_ids[-1] + 7 * len(token_ids)) % (vocab_size - 1)


@dataclass
class FakeSession:
    """What a fake engine remembers of a session."""

    token_ids: list[int]
    stop: StopConditions = field(default_factory=StopConditions)
    num_prompt_tokens: int = 0


class FakeEngine:
    """What the fake engines share."""

    def __init__(self, name: str, vocab_size: int = 100, max_model_len: int = 512) -> None:
        self.model_info = ModelInfo(
            name=name,
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            tokenizer_fingerprint="fa4e",
            num_parameters=1,
            dtype="float32",
            eos_token_ids=(0,),
            num_layers=12,
        )
        self.max_tree_nodes = 16
        self.sessions: dict[int, FakeSession] = {}
        self.events: list[str] = []
        self.start_gate, self.open_gate, self.step_gate = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.lost = asyncio.Event()
        for gate in (self.start_gate, self.open_gate, self.step_gate):
            gate.set()
        self.start_fault: Exception | None = None
        self.open_fault: Exception | None = None
        self.step_fault: Exception | None = None
        self._next_session_id = 1

    async def start(self) -> None:
        self.events.append("start")
        await self.start_gate.wait()
        if self.start_fault is not None:
            raise self.start_fault

    async def stop(self) -> None:
        self.events.append("stop")

    async def wait_lost(self) -> None:
        await self.lost.wait()

    def close(self, session_id: int) -> None:
        if self.sessions.pop(session_id, None) is not None:
            self.events.append("close")

    async def vocabulary(self) -> dict[int, str]:
        return {token_id: f"t{token_id}" for token_id in range(self.model_info.vocab_size)}

    def kv_usage(self) -> KvUsage:
        num_used_slots = sum(len(session.token_ids) for session in self.sessions.values())
        return KvUsage(num_slots=NUM_SLOTS, num_used_slots=num_used_slots, num_sessions=len(self.sessions))

    async def _open(self, model: str, session: FakeSession) -> int:
        self.events.append("open")
        try:
            await self.open_gate.wait()
        except asyncio.CancelledError:
            self.events.append("withdraw")
            raise
        if self.open_fault is not None:
            raise self.open_fault
        if model not in ("", self.model_info.name):
            raise UnknownModelError(model, self.model_info.name)
        if len(session.token_ids) >= self.model_info.max_model_len:
            raise PromptTooLongError(
                "prompt_token_ids",
                f"{len(session.token_ids)} tokens",
                f"at most {self.model_info.max_model_len - 1} tokens",
            )
        session_id = self._next_session_id
        self._next_session_id += 1
        self.sessions[session_id] = session
        return session_id

    async def _step(self, session_id: int, base_length: int) -> FakeSession:
        self.events.append("step")
        await self.step_gate.wait()
        if self.step_fault is not None:
            raise self.step_fault
        session = self.sessions[session_id]
        if base_length != len(session.token_ids):
            raise StalePositionError(base_length, len(session.token_ids))
        return session


class FakeVerifierEngine(FakeEngine):
    """A VerifierEngine that says `next_token`."""

    row_invariant = True

    async def open(self, request: OpenVerification) -> int:
        request.sampling.check(self.model_info.vocab_size)
        token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        return await self._open(request.model, FakeSession(token_ids, request.stop, len(request.prompt_token_ids)))

    async def verdicts(
        self, session_id: int, base_length: int, tree: TokenTree, num_plain_rounds: int
    ) -> AsyncIterator[tuple[Verdict, VerifyTimings]]:
        for index in range(num_plain_rounds + 1):
            verdict, timings = await self.verify(session_id, base_length, tree if index == 0 else EMPTY_TREE)
            yield verdict, timings
            if verdict.finish_reason is not None:
                return
            base_length += len(verdict.token_ids)

    async def verify(self, session_id: int, base_length: int, tree: TokenTree) -> tuple[Verdict, VerifyTimings]:
        tree.check(self.model_info.vocab_size, self.max_tree_nodes)
        session = await self._step(session_id, base_length)
        new_token_ids: list[int] = []
        accepted_rows: list[int] = []
        row: int | None = 0
        reason: FinishReason | None = None
        while row is not None and reason is None:
            token_id = next_token(session.token_ids, self.model_info.vocab_size)
            session.token_ids.append(token_id)
            new_token_ids.append(token_id)
            row = tree.children[row].get(token_id)
            accepted_rows += [] if row is None else [row]
            reason = self._finish_reason(session)
        verdict = Verdict(
            base_length=base_length,
            token_ids=tuple(new_token_ids),
            accepted_rows=tuple(accepted_rows),
            finish_reason=reason,
            matched_stop_token_id=new_token_ids[-1] if reason is FinishReason.STOP else None,
        )
        return verdict, VerifyTimings(queue_ns=1, compute_ns=2, num_batch_rows=1 + len(tree), num_batch_sessions=1)

    def _finish_reason(self, session: FakeSession) -> FinishReason | None:
        if session.token_ids[-1] in session.stop.stop_token_ids:
            return FinishReason.STOP
        num_output_tokens = len(session.token_ids) - session.num_prompt_tokens
        if num_output_tokens == session.stop.max_tokens or len(session.token_ids) == self.model_info.max_model_len:
            return FinishReason.LENGTH
        return None


class FakeDrafterEngine(FakeEngine):
    """A DrafterEngine that guesses right down to the budget's last level, with wrong siblings in between."""

    sources = DraftSources.MODEL
    layer_groups = "0 | 1-10 | 11"
    layer_plan = LayerPlanRequest(layer_parallel_size=10, mlp=MlpPlacement.STAGED, calibration=True)

    async def open(self, request: OpenSpeculation) -> int:
        request.sampling.check(self.model_info.vocab_size)
        return await self._open(request.model, FakeSession(list(request.prompt_token_ids)))

    async def draft(self, session_id: int, calibration: Calibration) -> Draft:
        calibration.budget.check(self.max_tree_nodes)
        session = await self._step(session_id, calibration.base_length)
        session.token_ids += calibration.token_ids
        guessed = list(session.token_ids)
        token_ids: list[int] = []
        parent_rows: list[int] = []
        parent_row = 0
        for _ in range(calibration.budget.num_levels):
            right = next_token(guessed, self.model_info.vocab_size)
            wrong = (right + 1) % self.model_info.vocab_size
            level = [wrong, right] if calibration.budget.width > 1 else [right]
            if len(token_ids) + len(level) > calibration.budget.num_nodes:
                break
            token_ids += level
            parent_rows += [parent_row] * len(level)
            parent_row = len(token_ids)
            guessed.append(right)
        tree = TokenTree(tuple(token_ids), tuple(parent_rows))
        timings = DraftTimings(queue_ns=1, calibrate_ns=2, fuzzy_ns=3, num_fuzzy_steps=tree.num_levels)
        return Draft(base_length=len(session.token_ids), tree=tree, timings=timings)
