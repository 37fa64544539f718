"""Verifier and drafter without models, as real gRPC services on free ports.

Both speak a toy language in which the next token depends on its position (and, above temperature 0, on the seed)
alone. The drafter can be told to be slow, wrong, failing or dead; the verifier cannot be wrong.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers

from drafter_service.config import DrafterSettings
from drafter_service.server import DrafterServer
from easyspec.errors import PromptTooLongError, StalePositionError
from easyspec.rpc.application import Application
from easyspec.rpc.lifecycle import RpcServer, run_role
from easyspec.settings import EngineSettings
from easyspec.speculation.messages import (
    Calibration,
    Draft,
    DraftTimings,
    KvUsage,
    ModelInfo,
    OpenSpeculation,
    OpenVerification,
    TokenLogprobs,
    Verdict,
    VerifyTimings,
)
from easyspec.speculation.parameters import FinishReason, LayerPlanRequest, MlpPlacement, SamplingParameters
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from easyspec.tls import ServerTls
from easyspec.tokenizer_fingerprint import TOKENIZER_FILE, tokenizer_fingerprint
from verifier_service.config import VerifierSettings
from verifier_service.server import VerifierServer

NUM_SLOTS = 4096
MAX_TREE_NODES = 64
TOY_TEXT = "the quick brown fox; 😀 über 中文 STOP here.\n"


@dataclass(frozen=True)
class ToyLanguage:
    """The token at position p is `token_ids[p]`, round and round; a seed above 0 shifts the start.

    `model_fingerprint` is the digest of the weights that speak it, `vocabulary` what its tokens mean, if it tells.
    """

    token_ids: tuple[int, ...]
    vocab_size: int
    fingerprint: str
    eos_token_id: int = 0
    max_model_len: int = 2048
    model_fingerprint: str = "70f"
    vocabulary: Mapping[int, str] = field(default_factory=dict)

    def token_at(self, position: int, sampling: SamplingParameters) -> int:
        shift = 0 if sampling.is_greedy else sampling.seed
        return self.token_ids[(position + shift) % len(self.token_ids)]

    def logprobs_of(self, token_id: int, num_top: int) -> TokenLogprobs:
        """The token itself is always the likeliest, at -0.5; those after it are one less likely each."""
        top = tuple(((token_id + i) % self.vocab_size, -0.5 - i) for i in range(num_top))
        return TokenLogprobs(-0.5, top)

    def model_info(self, name: str) -> ModelInfo:
        return ModelInfo(
            name,
            self.vocab_size,
            self.max_model_len,
            self.fingerprint,
            1000,
            "float32",
            (self.eos_token_id,),
            8,
            self.model_fingerprint,
        )


@dataclass
class _Session:
    committed: list[int]
    num_prompt: int
    opening: OpenVerification | OpenSpeculation


class FakeEngine:
    """What both fakes share: sessions and their memory."""

    def __init__(self, language: ToyLanguage, name: str) -> None:
        self.language = language
        self._name = name
        self.sessions: dict[int, _Session] = {}
        self._ids = itertools.count()
        self.num_opened = 0

    @property
    def model_info(self) -> ModelInfo:
        return self.language.model_info(self._name)

    @property
    def max_tree_nodes(self) -> int:
        return MAX_TREE_NODES

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def wait_lost(self) -> None:
        await asyncio.Event().wait()

    async def vocabulary(self) -> Mapping[int, str]:
        return self.language.vocabulary

    def kv_usage(self) -> KvUsage:
        num_used = sum(len(session.committed) for session in self.sessions.values())
        return KvUsage(NUM_SLOTS, num_used, len(self.sessions))

    def close(self, session_id: int) -> None:
        self.sessions.pop(session_id, None)

    def _open(self, opening: OpenVerification | OpenSpeculation) -> int:
        num_tokens = len(opening.prompt_token_ids)
        if num_tokens >= self.language.max_model_len:
            raise PromptTooLongError("prompt_token_ids", num_tokens, f"at most {self.language.max_model_len - 1}")
        session_id = next(self._ids)
        self.sessions[session_id] = _Session(list(opening.prompt_token_ids), num_tokens, opening)
        self.num_opened += 1
        return session_id

    def _at(self, session_id: int, base_length: int) -> _Session:
        session = self.sessions[session_id]
        if base_length != len(session.committed):
            raise StalePositionError(base_length, len(session.committed))
        return session


class FakeVerifierEngine(FakeEngine):
    """Speaks the language; a verdict takes `delay_s` seconds, or raises `error`."""

    def __init__(self, language: ToyLanguage) -> None:
        super().__init__(language, "toy-base")
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.open_error: Exception | None = None
        self.row_invariant = True
        self.trees: list[TokenTree] = []

    async def open(self, request: OpenVerification) -> int:
        if self.open_error is not None:
            raise self.open_error
        session_id = self._open(request)
        self.sessions[session_id].committed.extend(request.output_token_ids)
        return session_id

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
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        tree.check(self.language.vocab_size, MAX_TREE_NODES)
        session = self._at(session_id, base_length)
        self.trees.append(tree)
        verdict = self._with_logprobs(session, self._verdict(session, tree))
        session.committed.extend(verdict.token_ids)
        return verdict, VerifyTimings(1_000, 2_000, len(tree) + 1, 1)

    def _with_logprobs(self, session: _Session, verdict: Verdict) -> Verdict:
        opening = session.opening
        assert isinstance(opening, OpenVerification)
        num_top = opening.num_top_logprobs
        if num_top is None:
            return verdict
        is_prompt_due = opening.prompt_logprobs and verdict.base_length == session.num_prompt
        prompt = opening.prompt_token_ids[1:] if is_prompt_due else ()
        return replace(
            verdict,
            logprobs=tuple(self.language.logprobs_of(token_id, num_top) for token_id in verdict.token_ids),
            prompt_logprobs=tuple(self.language.logprobs_of(token_id, num_top) for token_id in prompt),
        )

    def _verdict(self, session: _Session, tree: TokenTree) -> Verdict:
        opening = session.opening
        assert isinstance(opening, OpenVerification)
        stops = set(opening.stop.stop_token_ids) | (set() if opening.stop.ignore_eos else {self.language.eos_token_id})
        limit = min(
            opening.stop.max_tokens or self.language.max_model_len, self.language.max_model_len - session.num_prompt
        )
        base_length = len(session.committed)
        token_ids: list[int] = []
        rows: list[int] = []
        row: int | None = 0
        while row is not None:
            token_id = self.language.token_at(base_length + len(token_ids), opening.sampling)
            token_ids.append(token_id)
            row = tree.children[row].get(token_id)
            rows += [row] if row is not None else []
            if token_id in stops:
                return Verdict(base_length, tuple(token_ids), tuple(rows), FinishReason.STOP, token_id)
            if base_length + len(token_ids) - session.num_prompt >= limit:
                return Verdict(base_length, tuple(token_ids), tuple(rows), FinishReason.LENGTH)
        return Verdict(base_length, tuple(token_ids), tuple(rows))


class FakeDrafterEngine(FakeEngine):
    """Guesses a chain, right at every position that is not a multiple of `wrong_every`, each with a wrong sibling.

    A draft takes `delay_s` seconds, then raises `error` if there is one; `tree` replaces the guess.
    """

    def __init__(self, language: ToyLanguage) -> None:
        super().__init__(language, "toy-draft")
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.open_error: Exception | None = None
        self.tree: TokenTree | None = None
        self.wrong_every = 5
        self.num_drafts = 0
        self.sources = DraftSources.MODEL
        self.layer_groups = "0 | 1-6 | 7"
        self.layer_plan = LayerPlanRequest(6, MlpPlacement.STAGED, True)

    async def open(self, request: OpenSpeculation) -> int:
        if self.open_error is not None:
            raise self.open_error
        return self._open(request)

    async def draft(self, session_id: int, calibration: Calibration) -> Draft:
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        session = self._at(session_id, calibration.base_length)
        session.committed.extend(calibration.token_ids)
        self.num_drafts += 1
        tree = self.tree or self._guess(session, calibration)
        return Draft(len(session.committed), tree, DraftTimings(10, 200, 300, calibration.budget.num_levels - 1))

    def _guess(self, session: _Session, calibration: Calibration) -> TokenTree:
        token_ids: list[int] = []
        parent_rows: list[int] = []
        parent_row = 0
        for level in range(calibration.budget.num_levels):
            position = len(session.committed) + level
            right = self.language.token_at(position, session.opening.sampling)
            wrong = (right + 1) % self.language.vocab_size
            guesses = [(right + 2) % self.language.vocab_size if position % self.wrong_every == 0 else right, wrong]
            for token_id in guesses[: calibration.budget.num_nodes - len(token_ids)]:
                token_ids.append(token_id)
                parent_rows.append(parent_row)
            parent_row = len(token_ids) - 1
            if len(token_ids) == calibration.budget.num_nodes:
                break
        return TokenTree(tuple(token_ids), tuple(parent_rows))


@dataclass
class RunningService:
    """An application on a port, which it keeps when it is killed and started again."""

    application: Application
    port: int = 0
    tls: ServerTls | None = None
    _server: RpcServer | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = RpcServer(self.application, self.address, self.tls)
        self.port = await self._server.listen()
        await self._server.start()

    async def kill(self, grace_s: float = 0.0) -> None:
        """Gone at once, or after `grace_s` seconds of draining."""
        if self._server is not None:
            await self._server.drain(grace_s)
            self._server = None


@asynccontextmanager
async def running(application: Application, tls: ServerTls | None = None) -> AsyncIterator[RunningService]:
    """Serve on a free port of the loopback interface."""
    service = RunningService(application, tls=tls)
    await service.start()
    try:
        yield service
    finally:
        await service.kill()


@dataclass(frozen=True)
class FakePair:
    """A verifier and a drafter that run."""

    language: ToyLanguage
    verifier: FakeVerifierEngine
    drafter: FakeDrafterEngine
    verifier_service: RunningService
    drafter_service: RunningService


@asynccontextmanager
async def running_pair(
    language: ToyLanguage, draft_language: ToyLanguage | None = None, tls: ServerTls | None = None
) -> AsyncIterator[FakePair]:
    """Both services; `draft_language` if the drafter is to speak another one."""
    verifier, drafter = FakeVerifierEngine(language), FakeDrafterEngine(draft_language or language)
    async with (
        running(VerifierServer(verifier), tls) as verifier_service,
        running(DrafterServer(drafter), tls) as drafter_service,
    ):
        yield FakePair(language, verifier, drafter, verifier_service, drafter_service)


def _build(settings: EngineSettings, engine_type: type[FakeEngine], server_type: Callable[[Any], Application]) -> Any:
    # Not our own Tokenizer, which takes seconds to import.
    folder = Path(settings.model)
    token_ids = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE)).encode(TOY_TEXT).ids
    language = ToyLanguage(tuple(token_ids), 352, tokenizer_fingerprint(folder))
    return server_type(engine_type(language))  # type: ignore[call-arg]


def main(role: str, arguments: Sequence[str]) -> int:
    """A fake as a process: `python -m tests.fakes.services verifier|drafter --model FOLDER ...`, FOLDER's tokenizer
    being all that is needed of it; `python -m tests.fakes.services crash` ends at once."""
    if role == "verifier":
        return run_role(
            role, VerifierSettings, lambda settings: _build(settings, FakeVerifierEngine, VerifierServer), arguments
        )
    if role == "drafter":
        return run_role(
            role, DrafterSettings, lambda settings: _build(settings, FakeDrafterEngine, DrafterServer), arguments
        )
    print(f"{role}: no weights in this folder", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
