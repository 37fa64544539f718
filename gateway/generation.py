"""One request, from text to a stream of text."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from easyspec.errors import InvalidRequestError, PromptTooLongError, UnavailableError, UnknownModelError
from easyspec.speculation.messages import ModelInfo, OpenSpeculation, OpenVerification
from easyspec.speculation.parameters import (
    FinishReason,
    LayerPlanRequest,
    SamplingParameters,
    StopConditions,
    TreeBudget,
)
from gateway.admission import Admission
from gateway.decode_loop import DraftSession, NoDraft, Round, decode
from gateway.detokenizer import Detokenizer
from gateway.draft_session import DrafterPool, ResilientDraftSession
from gateway.peers import PeerInfo, PeerState
from gateway.replicas import ReplicaSet
from gateway.statistics import RoundTimings, SpeculationStatistics, StatisticsRecorder
from gateway.tokenizer import ChatTurn, Tokenizer
from gateway.verify_session import ResilientVerifySession, VerifierPool

MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024


@dataclass(frozen=True)
class TokenIds:
    """A prompt that is tokenized already."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Conversation:
    """A prompt to be rendered with the model's chat template."""

    turns: tuple[ChatTurn, ...]


class SpeculationMode(enum.Enum):
    """Whether to speculate; AUTO leaves it to the gateway."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True)
class SpeculationWish:
    """How a request wants to be drafted; None takes the gateway's default."""

    mode: SpeculationMode = SpeculationMode.AUTO
    budget: TreeBudget | None = None
    layer_plan: LayerPlanRequest = field(default_factory=LayerPlanRequest)


@dataclass(frozen=True)
class GenerationRequest:
    """What a client asks for; nothing is checked yet.

    `client` tells clients apart for fairness and limits: the name of an API key, or the network peer.
    """

    prompt: str | TokenIds | Conversation
    sampling: SamplingParameters
    stop: StopConditions = field(default_factory=StopConditions)
    stop_strings: tuple[str, ...] = ()
    speculation: SpeculationWish = field(default_factory=SpeculationWish)
    model: str = ""
    request_id: str = ""
    client: str = ""


@dataclass(frozen=True)
class Completion:
    """The end of a completion. With STOP exactly one of the `matched_` fields is set."""

    finish_reason: FinishReason
    matched_token_id: int | None
    matched_stop_string: str | None
    num_prompt_tokens: int
    num_output_tokens: int
    statistics: SpeculationStatistics
    seed: int


@dataclass(frozen=True)
class GenerationChunk:
    """One round of a completion; `completion` is set on the last one only."""

    text: str
    token_ids: tuple[int, ...]
    num_accepted: int
    token_texts: tuple[str, ...]
    timings: RoundTimings
    completion: Completion | None


class Generator:
    """Turns requests into completions, many at a time. `drafters` is None when no drafter is configured."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        verifiers: VerifierPool,
        drafters: DrafterPool | None,
        admission: Admission,
        default_budget: TreeBudget,
    ) -> None:
        self._tokenizer = tokenizer
        self._verifiers = verifiers
        self._drafters = drafters
        self._admission = admission
        self.default_budget = default_budget

    @property
    def num_running(self) -> int:
        return self._admission.num_running

    @property
    def verifier_peer(self) -> ReplicaSet[Any]:
        return self._verifiers.replicas

    @property
    def drafter_peer(self) -> ReplicaSet[Any] | None:
        return self._drafters.replicas if self._drafters is not None else None

    async def generate(self, request: GenerationRequest, timeout_s: float) -> AsyncGenerator[GenerationChunk, None]:
        """Yield one chunk per round. Raises EasyspecError; closing the iterator frees everything downstream."""
        arrival_ns = time.monotonic_ns()
        peer_info = self._verifier_info()
        self._check(request, peer_info)
        prompt = await self._encode(request.prompt)
        _check_prompt(prompt, peer_info.model)
        budget = request.speculation.budget or self.default_budget
        async with self._admission.place(), contextlib.AsyncExitStack() as sessions:
            opening = OpenVerification(prompt, request.sampling, request.stop, (), request.model, request.request_id)
            drafter = await sessions.enter_async_context(self._draft_session(request, prompt, peer_info.model))
            verifier = await sessions.enter_async_context(self._verifiers.open(opening, timeout_s))
            rounds = await sessions.enter_async_context(
                contextlib.aclosing(decode(len(prompt), budget, verifier, drafter))
            )
            output = _Output(request, len(prompt), self._tokenizer, drafter, verifier, arrival_ns)
            async for round_ in rounds:
                chunk = output.take(round_)
                yield chunk
                if chunk.completion is not None:
                    return

    def _verifier_info(self) -> PeerInfo:
        peer = self._verifiers.replicas
        info = peer.info
        if info is None or peer.state is PeerState.REFUSED:
            raise UnavailableError(f"the verifier is {peer.state.value}")
        return info

    def _check(self, request: GenerationRequest, peer_info: PeerInfo) -> None:
        model = peer_info.model
        if request.model not in ("", model.name):
            raise UnknownModelError(request.model, model.name)
        request.sampling.check(model.vocab_size)
        request.stop.check(model.vocab_size)
        _check_stop_strings(request.stop_strings)
        if request.speculation.budget is not None:
            request.speculation.budget.check(peer_info.max_tree_nodes)
        layer_parallel_size = request.speculation.layer_plan.layer_parallel_size
        if layer_parallel_size is not None and layer_parallel_size < 1:
            raise InvalidRequestError("speculation.layer_plan.layer_parallel_size", layer_parallel_size, "at least 1")

    async def _encode(self, prompt: str | TokenIds | Conversation) -> tuple[int, ...]:
        if isinstance(prompt, TokenIds):
            return prompt.ids
        # A long text takes milliseconds: not on the event loop.
        if isinstance(prompt, Conversation):
            return await asyncio.to_thread(self._tokenizer.encode_chat, prompt.turns)
        if not prompt:
            raise InvalidRequestError("prompt.text", prompt, "at least one character")
        return await asyncio.to_thread(self._tokenizer.encode, prompt)

    @contextlib.asynccontextmanager
    async def _draft_session(
        self, request: GenerationRequest, prompt: tuple[int, ...], model: ModelInfo
    ) -> AsyncIterator[DraftSession]:
        wish = request.speculation
        if self._drafters is None or wish.mode is SpeculationMode.OFF:
            yield NoDraft()
            return
        max_total_length = model.max_model_len
        if request.stop.max_tokens is not None:
            max_total_length = min(max_total_length, len(prompt) + request.stop.max_tokens)
        opening = OpenSpeculation(
            prompt,
            request.sampling,
            wish.layer_plan,
            max_total_length=max_total_length,
            request_id=request.request_id,
        )
        async with self._drafters.session(opening, model.vocab_size) as session:
            yield session


class _Output:
    """The output of one request so far."""

    def __init__(
        self,
        request: GenerationRequest,
        num_prompt_tokens: int,
        tokenizer: Tokenizer,
        drafter: DraftSession,
        verifier: ResilientVerifySession,
        arrival_ns: int,
    ) -> None:
        self._request = request
        self._num_prompt_tokens = num_prompt_tokens
        self._tokenizer = tokenizer
        self._drafter = drafter
        self._verifier = verifier
        self._detokenizer = Detokenizer(tokenizer, request.stop_strings)
        self._recorder = StatisticsRecorder(arrival_ns)
        self._num_output_tokens = 0

    def take(self, round_: Round) -> GenerationChunk:
        """The chunk for a round; its `completion` is set if the output ends here."""
        verdict = round_.answer.verdict
        detokenized = self._detokenizer.push(verdict.token_ids, is_last=verdict.finish_reason is not None)
        token_ids = verdict.token_ids[: detokenized.num_tokens]
        num_accepted = min(verdict.num_accepted, len(token_ids))
        self._num_output_tokens += len(token_ids)
        timings = self._recorder.record(round_, num_accepted)
        is_plain = isinstance(self._drafter, NoDraft)
        return GenerationChunk(
            text=detokenized.text,
            token_ids=token_ids,
            num_accepted=num_accepted,
            token_texts=() if is_plain else tuple(self._tokenizer.token_text(token_id) for token_id in token_ids),
            timings=timings,
            completion=self._completion(round_, detokenized.matched_stop),
        )

    def _completion(self, round_: Round, matched_stop: str | None) -> Completion | None:
        verdict = round_.answer.verdict
        reason = FinishReason.STOP if matched_stop is not None else verdict.finish_reason
        if reason is None:
            return None
        drafter = self._drafter
        num_failures = drafter.num_failures if isinstance(drafter, ResilientDraftSession) else 0
        return Completion(
            finish_reason=reason,
            matched_token_id=verdict.matched_stop_token_id if matched_stop is None else None,
            matched_stop_string=matched_stop,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            statistics=self._recorder.finish(num_failures, self._verifier.num_failures),
            seed=self._request.sampling.seed,
        )


def _check_prompt(prompt: tuple[int, ...], model: ModelInfo) -> None:
    if not prompt:
        raise InvalidRequestError("prompt", "0 tokens", "at least one token")
    if len(prompt) >= model.max_model_len:
        raise PromptTooLongError("prompt", f"{len(prompt)} tokens", f"at most {model.max_model_len - 1} tokens")
    for index, token_id in enumerate(prompt):
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequestError(f"prompt.token_ids[{index}]", token_id, f"0 to {model.vocab_size - 1}")


def _check_stop_strings(stop_strings: tuple[str, ...]) -> None:
    if len(stop_strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError("stop_strings", f"{len(stop_strings)} strings", f"at most {MAX_STOP_STRINGS}")
    for index, stop in enumerate(stop_strings):
        if not 1 <= len(stop) <= MAX_STOP_STRING_CHARS:
            raise InvalidRequestError(f"stop_strings[{index}]", stop, f"1 to {MAX_STOP_STRING_CHARS} characters")
