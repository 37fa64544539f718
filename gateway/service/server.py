"""The gateway's wire: GenerationService, and the process behind it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any

import grpc
import structlog

from easyspec import __version__
from easyspec.checkpoint.generation import SamplingDefaults
from easyspec.errors import InvalidRequestError
from easyspec.rpc import convert
from easyspec.rpc.application import Application
from easyspec.telemetry.tracing import open_tracing
from easyspec.thread_pool import started_pool
from easyspec.v1 import generation_pb2, generation_pb2_grpc, types_pb2
from gateway.doorway.api_keys import ApiKeys, ClientLimiter
from gateway.generation.generator import Generator
from gateway.generation.served_models import ServedModels
from gateway.generation.state_metrics import StateCollector
from gateway.messages.chunk import Completion, GenerationChunk
from gateway.messages.request import GenerationRequest, SpeculationMode, SpeculationWish, TokenIds
from gateway.peers.peer import PeerState
from gateway.rest.server import RestServer
from gateway.service.assembly import Assembly, load_tokenizers
from gateway.service.config import HTTP_OFF, GatewaySettings
from gateway.telemetry.metrics import GatewayMetrics
from gateway.telemetry.observation import GenerationObserver, RequestLog
from gateway.telemetry.request_span import request_spans
from gateway.text.conversation import ChatTurn, Conversation, ToolCall, ToolDefinition, ToolMode, Tools

_KEYS_POLL_S = 2.0
# Of what would hold up the event loop: large bodies, schemas, finished outputs to check.
_NUM_WORKERS = 4

_PeerState = generation_pb2.GetServerInfoResponse
_Mode = generation_pb2.SpeculationParameters
_ToolMode = generation_pb2.ToolChoice
_MODES: Mapping[_Mode.Mode.ValueType, SpeculationMode] = MappingProxyType(
    {_Mode.MODE_UNSPECIFIED: SpeculationMode.AUTO}
    | {_Mode.Mode.Value(f"MODE_{mode.name}"): mode for mode in SpeculationMode}
)
_TOOL_MODES: Mapping[_ToolMode.Mode.ValueType, ToolMode] = MappingProxyType(
    {_ToolMode.MODE_UNSPECIFIED: ToolMode.AUTO} | {_ToolMode.Mode.Value(f"MODE_{mode.name}"): mode for mode in ToolMode}
)


class GatewayServer(Application, generation_pb2_grpc.GenerationServiceServicer):
    """GenerationService over the served models."""

    service_name: str = generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name

    def __init__(self, settings: GatewaySettings, metrics: GatewayMetrics | None = None) -> None:
        self.settings = settings
        self.metrics: GatewayMetrics = metrics or GatewayMetrics()
        self.metrics.registry.register(StateCollector(lambda: self._models))
        self._watches: list[asyncio.Task[None]] = []
        self._assembly: Assembly | None = None
        self._models: ServedModels | None = None
        self._tracing = open_tracing("gateway", settings.otlp_endpoint)
        inline_keys = settings.api_keys.get_secret_value() if settings.api_keys else None
        self._keys = ApiKeys(settings.api_keys_file, inline_keys) if settings.asks_for_keys else None
        self._rest = RestServer(self) if settings.http_address != HTTP_OFF else None

    @property
    def http_port(self) -> int | None:
        """Where REST is served, once `start` has begun; None if it is not."""
        return self._rest.port if self._rest is not None else None

    def authenticate(self, authorization: str | None) -> str | None:
        """The client's name, None where no keys are configured; raises UnauthenticatedError."""
        return self._keys.authenticate(authorization) if self._keys is not None else None

    def reload(self) -> None:
        if self._keys is not None:
            self._keys.reload()

    @property
    def models(self) -> ServedModels:
        """Valid after `start`."""
        assert self._models is not None, "RPCs are refused until start has returned"
        return self._models

    @property
    def generator(self) -> Generator:
        """The first model's; valid after `start`."""
        return self.models.first

    def part_health(self) -> dict[str, bool]:
        """Of each model, by its name: whether a verifier can be used."""
        return {generator.name: generator.verifier_peer.is_ready for generator in self.models if generator.name}

    def add_to_server(self, server: grpc.aio.Server) -> None:
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self, server)

    async def start(self) -> None:
        """Wait for a verifier, of whichever model; other services may come later. REST is refused meanwhile, like
        RPCs."""
        if self._rest is not None:
            await self._rest.open()
        asyncio.get_running_loop().set_default_executor(started_pool(_NUM_WORKERS, "worker"))
        tokenizers = await asyncio.to_thread(load_tokenizers, self.settings)
        limiter = ClientLimiter(self.settings.max_requests_per_key if self._keys is not None else None)
        observers: list[GenerationObserver] = [self.metrics, RequestLog]
        if self._tracing is not None:
            observers.append(request_spans(self._tracing))
        self._assembly = Assembly(self.settings, observers, limiter)
        models = self._assembly.build(tokenizers)
        await models.wait_for_answer()
        self._watches = [asyncio.create_task(models.watch())]
        if self._keys is not None:
            self._watches.append(asyncio.create_task(self._keys.watch(_KEYS_POLL_S)))
        self._models = models
        if self._rest is not None:
            self._rest.admit()

    async def drain(self, grace_s: float) -> None:
        """REST's part of draining; RPCs have the same grace."""
        if self._rest is not None:
            await self._rest.drain(grace_s)

    async def stop(self) -> None:
        if self._rest is not None:
            await self._rest.close()
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        if self._assembly is not None:
            await self._assembly.close()
        if self._tracing is not None:
            await self._tracing.close()

    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[generation_pb2.GenerateResponse]:
        timeout_s = min(context.time_remaining() or self.settings.request_timeout_s, self.settings.request_timeout_s)
        self.settings.check_message_bytes(request.ByteSize())
        generator = self.models.of(request.model)
        asked = _request_from_pb(request, generator.sampling_defaults)
        async with aclosing(generator.generate(asked, timeout_s)) as chunks:
            async for chunk in chunks:
                yield _chunk_to_pb(chunk)

    async def ListModels(  # noqa: N802
        self, request: generation_pb2.ListModelsRequest, context: Any
    ) -> generation_pb2.ListModelsResponse:
        return generation_pb2.ListModelsResponse(models=map(convert.model_info_to_pb, self.models.infos))

    async def GetServerInfo(  # noqa: N802
        self, request: generation_pb2.GetServerInfoRequest, context: Any
    ) -> generation_pb2.GetServerInfoResponse:
        served = [_served_to_pb(generator) for generator in self.models]
        first = served[0]
        return generation_pb2.GetServerInfoResponse(
            version=__version__,
            models=map(convert.model_info_to_pb, self.models.infos),
            draft_model=first.draft_model if first.HasField("draft_model") else None,
            drafter_state=first.drafter_state,
            verifier_state=first.verifier_state,
            num_running_requests=self.models.num_running,
            default_budget=convert.budget_to_pb(self.generator.default_budget),
            served_models=served,
        )


def _peer_state_to_pb(state: PeerState) -> _PeerState.PeerState.ValueType:
    return _PeerState.PeerState.Value(f"PEER_STATE_{state.name}")


def _served_to_pb(generator: Generator) -> generation_pb2.ServedModel:
    base, drafter = generator.model_info, generator.drafter_peer
    draft = drafter.info if drafter is not None else None
    state = vars(generator.speculation.state())
    told = {name: state[name] for name in generation_pb2.SpeculationState.DESCRIPTOR.fields_by_name}
    told["budget"] = convert.budget_to_pb(told["budget"]) if told["budget"] is not None else None
    return generation_pb2.ServedModel(
        name=generator.name or "",
        base_model=convert.model_info_to_pb(base) if base is not None else None,
        verifier_state=_peer_state_to_pb(generator.verifier_peer.state),
        drafter_state=_peer_state_to_pb(drafter.state) if drafter is not None else _PeerState.PEER_STATE_UNSPECIFIED,
        draft_model=convert.model_info_to_pb(draft.model) if draft is not None else None,
        num_running_requests=generator.num_running,
        speculation=generation_pb2.SpeculationState(**told),
    )


def _request_from_pb(message: generation_pb2.GenerateRequest, defaults: SamplingDefaults) -> GenerationRequest:
    found_at_boundary = structlog.contextvars.get_contextvars()
    return GenerationRequest(
        prompt=_prompt_from_pb(message),
        sampling=convert.sampling_from_pb(message.sampling, default_seed=secrets.randbits(64), defaults=defaults.given),
        stop=convert.stop_from_pb(message.stop),
        stop_strings=tuple(message.stop_strings),
        speculation=_speculation_from_pb(message.speculation),
        model=message.model,
        request_id=str(found_at_boundary.get("request_id", "")),
        client=str(found_at_boundary.get("client", "")),
        num_choices=message.num_choices if message.HasField("num_choices") else 1,
        num_top_logprobs=message.num_top_logprobs if message.HasField("num_top_logprobs") else None,
        echo=message.echo,
        includes_stop=message.includes_stop,
        is_strict=message.is_strict,
    )


def _prompt_from_pb(message: generation_pb2.GenerateRequest) -> str | TokenIds | Conversation:
    kind = message.WhichOneof("prompt")
    if kind == "text":
        return message.text
    if kind == "token_ids":
        return TokenIds(tuple(message.token_ids.ids))
    if kind != "chat":
        raise InvalidRequestError("prompt", None, "text, token_ids or chat")
    turns = tuple(
        ChatTurn(
            turn.role,
            turn.content,
            tuple(ToolCall(call.id, call.name, call.arguments) for call in turn.tool_calls),
            turn.tool_call_id,
            turn.name,
            turn.reasoning,
        )
        for turn in message.chat.messages
    )
    return Conversation(turns, _tools_from_pb(message.chat), continues_last_turn=message.chat.continue_final_message)


def _tools_from_pb(message: generation_pb2.ChatPrompt) -> Tools | None:
    choice = message.tool_choice
    if choice.mode not in _TOOL_MODES:
        raise InvalidRequestError("tool_choice.mode", choice.mode, "a Mode: auto, none, required, named or unset")
    if not message.tools:
        if message.HasField("tool_choice") and choice.mode != _ToolMode.MODE_NONE:
            raise InvalidRequestError("tool_choice", "set", "only together with tools")
        return None
    definitions = tuple(
        ToolDefinition(tool.name, tool.description, tool.parameters_json_schema) for tool in message.tools
    )
    is_parallel = message.parallel_tool_calls if message.HasField("parallel_tool_calls") else True
    return Tools(definitions, _TOOL_MODES[choice.mode], choice.name, is_parallel)


def _speculation_from_pb(message: generation_pb2.SpeculationParameters) -> SpeculationWish:
    if message.mode not in _MODES:
        raise InvalidRequestError("speculation.mode", message.mode, "a Mode: auto, on, off or unset")
    return SpeculationWish(
        mode=_MODES[message.mode],
        budget=convert.budget_from_pb(message.budget) if message.HasField("budget") else None,
        layer_plan=convert.layer_plan_from_pb(message.layer_plan),
        is_traced=message.trace,
        sources=convert.sources_from_pb(message.sources, "speculation.sources"),
        draft_ahead=message.draft_ahead if message.HasField("draft_ahead") else True,
    )


def _chunk_to_pb(chunk: GenerationChunk) -> generation_pb2.GenerateResponse:
    trace = None
    if chunk.trace is not None:
        draft_tree = convert.tree_to_pb(chunk.trace.draft_tree)
        trace = generation_pb2.RoundTrace(**vars(chunk.trace) | {"draft_tree": draft_tree})
    return generation_pb2.GenerateResponse(
        text=chunk.text,
        token_ids=chunk.token_ids,
        num_accepted=chunk.num_accepted,
        token_texts=chunk.token_texts,
        timings=generation_pb2.RoundTimings(**vars(chunk.timings)),
        completion=_completion_to_pb(chunk.completion) if chunk.completion is not None else None,
        choice_index=chunk.choice_index,
        logprobs=[convert.logprobs_to_pb(entry) if entry else types_pb2.TokenLogprobs() for entry in chunk.logprobs],
        trace=trace,
        tool_calls=[
            generation_pb2.ToolCallDelta(
                index=call.index, id=call.id or "", name=call.name or "", arguments=call.arguments
            )
            for call in chunk.tool_calls
        ],
        reasoning=chunk.reasoning,
    )


def _completion_to_pb(completion: Completion) -> generation_pb2.Completion:
    sources = [
        generation_pb2.SourceStatistics(**vars(one) | {"source": convert.sources_to_pb(one.source)[0]})
        for one in completion.statistics.sources
    ]
    message = generation_pb2.Completion(
        finish_reason=convert.finish_reason_to_pb(completion.finish_reason),
        usage=generation_pb2.Usage(
            num_prompt_tokens=completion.num_prompt_tokens,
            num_output_tokens=completion.num_output_tokens,
            num_reasoning_tokens=completion.num_reasoning_tokens,
            num_cached_prompt_tokens=completion.num_cached_prompt_tokens,
        ),
        speculation=generation_pb2.SpeculationStatistics(**vars(completion.statistics) | {"sources": sources}),
        seed=completion.seed,
    )
    if completion.matched_token_id is not None:
        message.token_id = completion.matched_token_id
    if completion.matched_stop_string is not None:
        message.stop_string = completion.matched_stop_string
    if (check := completion.schema_check) is not None:
        message.schema_check.MergeFrom(
            generation_pb2.SchemaCheck(unenforced_keywords=check.keywords, is_valid=check.is_valid, reason=check.reason)
        )
    return message
