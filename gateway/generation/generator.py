"""One request, from text to a stream of text."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from easyspec.checkpoint.generation import NO_DEFAULTS, SamplingDefaults
from easyspec.errors import InvalidRequestError, PromptTooLongError, UnavailableError, UnknownModelError
from easyspec.speculation.checks import check_logprobs
from easyspec.speculation.messages import ModelInfo, OpenSpeculation, OpenVerification
from easyspec.speculation.parameters import (
    MAX_GRAMMAR_BYTES,
    MAX_TOP_LOGPROBS,
    GrammarKind,
    Thinking,
    TreeBudget,
)
from easyspec.speculation.schemas import enforceable
from easyspec.thread_pool import started_pool
from gateway.decode_loop import DraftSession, NoDraft, Round, decode
from gateway.doorway.admission import Admission
from gateway.doorway.api_keys import ClientLimiter
from gateway.doorway.backpressure import ended_when_unread
from gateway.generation.answer import AnswerForm, AnswerText
from gateway.generation.choices import choice_seed, merged
from gateway.generation.output import Output
from gateway.messages.chunk import GenerationChunk
from gateway.messages.limits import RequestLimits
from gateway.messages.progress import Progress
from gateway.messages.request import GenerationRequest, SpeculationMode, SpeculationWish, TokenIds
from gateway.messages.statistics import NO_ROUND
from gateway.peers.draft_session import DrafterPool
from gateway.peers.peer import PeerInfo, PeerState
from gateway.peers.replica_set import ReplicaSet
from gateway.peers.verify_session import VerifierPool
from gateway.speculation.controller import SpeculationController
from gateway.speculation.policy import FixedPolicy, Policy, SpeculationPolicy
from gateway.telemetry.observation import GenerationObserver, ObservedRequest, observed
from gateway.text.conversation import Conversation, ToolMode
from gateway.text.schema_check import UnenforcedSchema
from gateway.text.tokenizer import Tokenizer
from gateway.text.tools import ToolDialect, answer_or_calls, forced_grammar

_NUM_TOKENIZING = 4
# How the grammar library tells where in a grammar it found a fault: with its lines.
_PLACE_IN_LARK = re.compile(r"at \d+\(\d+\): failed to compile JSON schema: | 1 \| .*", re.DOTALL)


@dataclass(frozen=True)
class _Prepared:
    """What is known of a request before it is decoded: the prompt's tokens, what may be thought before the answer, and
    what is to be checked of it."""

    prompt: tuple[int, ...]
    thinking: Thinking | None
    schema: UnenforcedSchema | None


class Generator:
    """Turns requests to one base model into completions, many at a time.

    `drafters`, which other models may share, is None when no drafter is configured. `served_name` is what requests call
    the model; empty: what its verifiers call it. `sampling_defaults` are for readers of requests.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        verifiers: VerifierPool,
        drafters: DrafterPool | None,
        admission: Admission,
        default_budget: TreeBudget,
        stalled_client_timeout_s: float,
        limits: RequestLimits,
        clients: ClientLimiter,
        observers: Sequence[GenerationObserver],
        tool_dialect: ToolDialect = ToolDialect.NONE,
        served_name: str = "",
        sampling_defaults: SamplingDefaults = NO_DEFAULTS,
        closes_schemas: bool = True,
    ) -> None:
        self.sampling_defaults = sampling_defaults
        self._closes_schemas = closes_schemas
        self._served_name = served_name
        self._stalled_client_timeout_s = stalled_client_timeout_s
        self.tokenizer = tokenizer
        self._tokenizing = started_pool(_NUM_TOKENIZING, "tokenizing")
        self._tool_dialect = tool_dialect
        self._verifiers = verifiers
        self._drafters = drafters
        self._admission = admission
        self.default_budget = default_budget
        self._limits = limits
        self._clients = clients
        self._observers = observers
        self.speculation = SpeculationController(default_budget)

    @property
    def name(self) -> str | None:
        """What requests call the model; None while only its verifiers could tell and none of them has answered."""
        if self._served_name:
            return self._served_name
        info = self._verifiers.replicas.info
        return info.model.name if info is not None else None

    @property
    def model_info(self) -> ModelInfo | None:
        """The base model, by the name that requests use; None before a verifier has answered."""
        info = self._verifiers.replicas.info
        return self._named(info).model if info is not None else None

    def _named(self, info: PeerInfo) -> PeerInfo:
        return replace(info, model=replace(info.model, name=self._served_name)) if self._served_name else info

    def note_padding(self) -> None:
        """Say if base and draft have embedding tables of different sizes, as far as both are known."""
        info = self._verifiers.replicas.info
        if info is not None and self._drafters is not None:
            self._drafters.note_padding(info.model.vocab_size)

    @property
    def num_running(self) -> int:
        return self._admission.num_running

    @property
    def num_waiting(self) -> int:
        return self._admission.num_waiting

    @property
    def verifier_peer(self) -> ReplicaSet[Any]:
        return self._verifiers.replicas

    @property
    def drafter_peer(self) -> ReplicaSet[Any] | None:
        return self._drafters.replicas if self._drafters is not None else None

    async def generate(
        self, request: GenerationRequest, timeout_s: float, progress: Progress | None = None
    ) -> AsyncGenerator[GenerationChunk, None]:
        """Yield one chunk per round. Raises EasyspecError; closing the iterator frees everything downstream, and so
        does leaving a chunk untaken for too long.

        All choices share one place and the prompt's tokens, and are decoded at the same time. `progress` is kept
        up to date.
        """
        peer = self._verifiers.replicas
        info = peer.info
        if info is None or peer.state is PeerState.REFUSED:
            raise UnavailableError(f"the verifier is {peer.state.value}")
        peer_info = self._named(info)
        with observed(request, peer_info.model.name, self._observers) as observer:
            made = self._generate(request, timeout_s, peer_info, observer, progress or Progress())
            # Closed here and now, not by the garbage collector: sessions must be freed when the client goes.
            async with contextlib.aclosing(ended_when_unread(made, self._stalled_client_timeout_s)) as chunks:
                async for chunk in chunks:
                    observer.after_chunk(chunk)
                    yield chunk

    async def _generate(
        self,
        request: GenerationRequest,
        timeout_s: float,
        peer_info: PeerInfo,
        observer: ObservedRequest,
        progress: Progress,
    ) -> AsyncGenerator[GenerationChunk, None]:
        arrival_ns, sent = time.monotonic_ns(), request
        self._check(request, peer_info)
        if isinstance(request.prompt, Conversation) and not request.stop.ignore_eos:
            # An answer in a conversation ends with its turn, whatever else the checkpoint calls its end.
            stop_token_ids = request.stop.stop_token_ids | self.tokenizer.end_of_turn_ids
            request = replace(request, stop=replace(request.stop, stop_token_ids=stop_token_ids))
        request = self._with_forced_calls(request)
        # Places are given back last, when all sessions of the request have ended.
        async with contextlib.AsyncExitStack() as places:
            places.enter_context(self._clients.place(request.client, request.num_choices))
            if isinstance(request.prompt, TokenIds):  # what can be told at once is, also while others wait
                _check_prompt(request.prompt.ids, peer_info.model)
            else:
                self.check_size(request.prompt)
            request, schema = await self._with_enforceable_schema(request)
            request = self._with_calls_beside_answer(request)
            waiting_ns = time.monotonic_ns()
            place = self._admission.place(request.client, timeout_s, request.num_choices, request.request_id)
            await places.enter_async_context(place)
            waited_ns = time.monotonic_ns() - waiting_ns
            prompt, thinking = await self._encoded(request.prompt, peer_info.model.max_model_len)
            grammar = request.sampling.grammar
            if grammar is not None and thinking is not None:  # it is for what comes after the thinking
                request = _sampled(request, grammar=replace(grammar, thinking=thinking))
            prepared = _Prepared(prompt, thinking, schema)
            _check_prompt(prompt, peer_info.model)
            has_prompt = request.wants_prompt_logprobs
            check_logprobs(request.most_logprobs, has_prompt=has_prompt, num_prompt_tokens=len(prompt))
            observer.started(len(prompt), waited_ns)
            progress.admit(len(prompt))
            seeds = (choice_seed(request.sampling.seed, index) for index in range(request.num_choices))
            choices = [
                self._choice(_sampled(request, seed=seed), prepared, peer_info.model, timeout_s, arrival_ns, progress)
                for seed in seeds
            ]
            with _naming_what_was_sent(sent):
                async with contextlib.aclosing(merged(choices)) as chunks:
                    async for index, chunk in chunks:
                        yield replace(chunk, choice_index=index) if index else chunk

    async def _choice(
        self,
        request: GenerationRequest,
        prepared: _Prepared,
        model: ModelInfo,
        timeout_s: float,
        arrival_ns: int,
        progress: Progress,
    ) -> AsyncGenerator[GenerationChunk, None]:
        """One choice of a request that was checked, from an open session at each service to its end."""
        policy, prompt = self._policy(request.speculation), prepared.prompt
        # Left in reverse order: first the loop, whose round under way uses both sessions.
        async with contextlib.AsyncExitStack() as sessions:
            sessions.callback(policy.leave)  # it is load until then
            drafter = await sessions.enter_async_context(self._draft_session(request, prompt, model, policy))
            opening = OpenVerification(
                prompt,
                request.sampling,
                request.stop,
                request_id=request.request_id,
                num_top_logprobs=request.most_logprobs,
                prompt_logprobs=request.wants_prompt_logprobs,
            )
            verifier = await sessions.enter_async_context(self._verifiers.open(opening, timeout_s, progress))
            rounds = await sessions.enter_async_context(
                contextlib.aclosing(decode(len(prompt), policy, verifier, drafter))
            )
            tools = request.prompt.tools if isinstance(request.prompt, Conversation) else None
            form = AnswerForm(
                request.stop_strings,
                request.includes_stop,
                request.stop.min_tokens,
                tools,
                self._tool_dialect,
                prepared.thinking,
            )
            answer = AnswerText(self.tokenizer, form)
            output = Output(request, len(prompt), self.tokenizer, answer, drafter, verifier, arrival_ns)
            is_prompt_due = request.has_prompt_chunk
            async for round_ in rounds:
                if is_prompt_due:
                    is_prompt_due = False
                    yield self._echoed(request, prompt, round_)
                chunk = output.take(round_)
                if chunk.completion is not None and prepared.schema is not None:
                    chunk = replace(chunk, completion=await output.checked(chunk.completion, prepared.schema))
                yield chunk
                if chunk.completion is not None:  # the text may end before the verifier's tokens do
                    return

    def _with_forced_calls(self, request: GenerationRequest) -> GenerationRequest:
        """The request, with the grammar that its choice of tools amounts to."""
        tools = request.prompt.tools if isinstance(request.prompt, Conversation) else None
        if tools is None or not tools.is_forced:
            return request
        tools.check()
        if request.sampling.grammar is not None:
            raise InvalidRequestError("tool_choice", tools.mode.value, "auto or none together with a grammar")
        grammar = forced_grammar(tools, self._tool_dialect)
        num_bytes, most = len(grammar.text.encode()), self._limits.max_grammar_bytes
        if num_bytes > most:
            raise InvalidRequestError("tools", f"{num_bytes} bytes of schemas", f"at most {most} bytes")
        is_strict = any(tool.is_strict for tool in tools.callable_definitions)
        return replace(_sampled(request, grammar=grammar), is_strict=is_strict)

    def _with_calls_beside_answer(self, request: GenerationRequest) -> GenerationRequest:
        tools = request.prompt.tools if isinstance(request.prompt, Conversation) else None
        grammar = request.sampling.grammar
        if tools is None or tools.mode is not ToolMode.AUTO:
            return request
        if grammar is None or grammar.kind is not GrammarKind.JSON_SCHEMA:
            return request
        grammar = answer_or_calls(grammar, self._tool_dialect, self.tokenizer.in_lark)
        if len(grammar.text.encode()) > MAX_GRAMMAR_BYTES:  # what is around a schema of the allowed size is too much
            return request
        return _sampled(request, grammar=grammar)

    async def _with_enforceable_schema(
        self, request: GenerationRequest
    ) -> tuple[GenerationRequest, UnenforcedSchema | None]:
        """The request with a schema that a grammar can enforce, and the one it had if that says more."""
        grammar = request.sampling.grammar
        if grammar is None or grammar.kind is not GrammarKind.JSON_SCHEMA:
            return request, None
        name = "sampling.grammar.json_schema"
        try:
            # A large schema takes long: not on the event loop.
            schema = await asyncio.to_thread(
                enforceable,
                grammar.text,
                closes_objects=self._closes_schemas,
                bounds_values=True,
                keeps_one_of=request.is_strict,
            )
        except ValueError as error:
            raise InvalidRequestError(name, grammar.text, f"a JSON Schema, but: {error}") from None
        if schema.unenforced and request.is_strict:
            keywords = ", ".join(schema.unenforced)
            raise InvalidRequestError(name, keywords, "keywords that can be enforced, as strict is set")
        unenforced = UnenforcedSchema(grammar.text, schema.unenforced) if schema.unenforced else None
        return _sampled(request, grammar=replace(grammar, text=schema.text)), unenforced

    def _echoed(self, request: GenerationRequest, prompt: tuple[int, ...], first: Round) -> GenerationChunk:
        text = ""
        if request.echo:
            text = request.prompt if isinstance(request.prompt, str) else self.tokenizer.decode(prompt)
        logprobs = first.answer.verdict.prompt_logprobs
        return GenerationChunk(
            text=text,
            token_ids=prompt,
            num_accepted=0,
            token_texts=(),
            timings=NO_ROUND,
            completion=None,
            logprobs=(None, *logprobs) if request.wants_prompt_logprobs else (),
        )

    def _policy(self, wish: SpeculationWish) -> Policy:
        if self._drafters is None or wish.mode is SpeculationMode.OFF:
            return FixedPolicy(self.speculation, None)
        if wish.mode is SpeculationMode.ON:
            return FixedPolicy(self.speculation, wish.budget or self.default_budget)
        return SpeculationPolicy(self.speculation, wish.budget)

    def _check(self, request: GenerationRequest, peer_info: PeerInfo) -> None:
        model = peer_info.model
        if request.model not in ("", model.name):
            raise UnknownModelError(request.model, model.name)
        self._limits.check_sampling(request.sampling)
        self._limits.check_stops(request.stop, request.stop_strings)
        request.sampling.check(model.vocab_size)
        request.stop.check(model.vocab_size)
        self._limits.check_choices("num_choices", request.num_choices)
        if request.num_top_logprobs is not None and not 0 <= request.num_top_logprobs <= MAX_TOP_LOGPROBS:
            raise InvalidRequestError(
                "num_top_logprobs", request.num_top_logprobs, f"0 to {MAX_TOP_LOGPROBS}, or unset"
            )
        if request.speculation.budget is not None:
            request.speculation.budget.check(peer_info.max_tree_nodes)
        layer_parallel_size = request.speculation.layer_plan.layer_parallel_size
        if layer_parallel_size is not None and layer_parallel_size < 1:
            raise InvalidRequestError("speculation.layer_plan.layer_parallel_size", layer_parallel_size, "at least 1")

    async def encode(self, prompt: str | TokenIds | Conversation, max_tokens: int) -> tuple[int, ...]:
        """The token ids of a prompt; raises PromptTooLongError soon for one that has many more than `max_tokens`."""
        token_ids, _ = await self._encoded(prompt, max_tokens)
        return token_ids

    async def _encoded(
        self, prompt: str | TokenIds | Conversation, max_tokens: int
    ) -> tuple[tuple[int, ...], Thinking | None]:
        """The same, and what may be thought before the answer."""
        if isinstance(prompt, TokenIds):
            return prompt.ids, None
        # A long text takes seconds and a hundred times its memory: a few at a time, and not on the event loop.
        loop = asyncio.get_running_loop()
        if isinstance(prompt, Conversation):
            rendered = await loop.run_in_executor(self._tokenizing, self.tokenizer.prompt_of, prompt, max_tokens)
            return rendered.token_ids, rendered.thinking
        return await loop.run_in_executor(self._tokenizing, self.tokenizer.encode, prompt, max_tokens), None

    def check_size(self, prompt: str | Conversation) -> None:
        """Raise InvalidRequestError for a prompt that is empty, or too large to be worth tokenizing."""
        if isinstance(prompt, Conversation):
            self._limits.check_messages("prompt.chat.messages", len(prompt.turns))
            self._limits.check_text("prompt.chat.messages", prompt.num_chars)
        elif not prompt:
            raise InvalidRequestError("prompt.text", prompt, "at least one character")
        else:
            self._limits.check_text("prompt.text", len(prompt))

    @contextlib.asynccontextmanager
    async def _draft_session(
        self, request: GenerationRequest, prompt: tuple[int, ...], model: ModelInfo, policy: Policy
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
            sources=wish.sources,
            draft_ahead=wish.draft_ahead,
            base_fingerprint=model.fingerprint,
        )
        async with self._drafters.session(opening, model.vocab_size, is_wanted=policy.wants_drafts) as session:
            yield session


def _sampled(request: GenerationRequest, **changes: Any) -> GenerationRequest:
    return replace(request, sampling=replace(request.sampling, **changes))


@contextlib.contextmanager
def _naming_what_was_sent(request: GenerationRequest) -> Iterator[None]:
    """Errors about a grammar that the gateway made name what the client sent, as it was sent."""
    try:
        yield
    except InvalidRequestError as error:
        if not error.field.startswith("sampling.grammar."):
            raise
        reason = _PLACE_IN_LARK.sub("", error.allowed)
        if (grammar := request.sampling.grammar) is not None:
            allowed = error.allowed if grammar.kind is GrammarKind.LARK else reason
            raise InvalidRequestError(f"sampling.grammar.{grammar.kind.value}", grammar.text, allowed) from error
        assert isinstance(request.prompt, Conversation)
        assert request.prompt.tools is not None
        names = [tool.name for tool in request.prompt.tools.callable_definitions]
        for name in names:
            reason = reason.replace(f"json-schema:///#/$defs/{name}", name).replace(f"/$defs/{name}/", "/")
        raise InvalidRequestError("tools", names, reason) from error


def _check_prompt(prompt: tuple[int, ...], model: ModelInfo) -> None:
    if not prompt:
        raise InvalidRequestError("prompt", "0 tokens", "at least one token")
    if len(prompt) >= model.max_model_len:
        raise PromptTooLongError("prompt", f"{len(prompt)} tokens", f"at most {model.max_model_len - 1} tokens")
    for index, token_id in enumerate(prompt):
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequestError(f"prompt.token_ids[{index}]", token_id, f"0 to {model.vocab_size - 1}")
