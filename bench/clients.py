"""The gateway as the benchmark's client sees it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc

from bench.measurement import Mode, Round, Sample
from easyspec.errors import UnavailableError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.convert import budget_from_pb, budget_to_pb, layer_plan_to_pb, sources_from_pb, sources_to_pb
from easyspec.rpc.errors import error_from_rpc
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.sources import NO_SOURCES, DraftSources
from easyspec.v1 import generation_pb2 as pb
from easyspec.v1 import generation_pb2_grpc, types_pb2

_Mode = pb.SpeculationParameters.Mode


@dataclass(frozen=True)
class Task:
    """One completion to measure; `budget` None takes the gateway's default."""

    prompt_index: int
    prompt: str
    mode: Mode
    temperature: float
    seed: int
    max_tokens: int
    budget: TreeBudget | None = None
    draft_ahead: bool = True


@dataclass(frozen=True)
class ServedModels:
    """What the measured services run; `default_budget` is the gateway's."""

    base: str
    draft: str
    default_budget: TreeBudget


class GatewayClient:
    """Async context manager; make it inside the event loop that uses it. Every failure is an EasyspecError."""

    def __init__(self, address: str, timeout_s: float) -> None:
        self._channel = open_channel(address)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._timeout_s = timeout_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def models(self) -> ServedModels:
        """Describe base and draft model; raises UnavailableError if the gateway has no drafter it may use."""
        try:
            info = await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        if info.drafter_state != pb.GetServerInfoResponse.PEER_STATE_READY:
            state = pb.GetServerInfoResponse.PeerState.Name(info.drafter_state)
            raise UnavailableError(f"the drafter is {state}; a decode benchmark needs it READY")
        return ServedModels(
            base=_describe(info.models[0]),
            draft=_describe(info.draft_model),
            default_budget=budget_from_pb(info.default_budget),
        )

    async def complete(self, task: Task) -> Sample:
        """Run one completion to its end and return everything it told."""
        rounds: list[Round] = []
        token_ids: list[int] = []
        completion = pb.Completion()
        start_s = time.perf_counter()
        try:
            async for message in self._stub.Generate(_request(task), timeout=self._timeout_s):
                rounds.append(_round_from_pb(message, time.perf_counter() - start_s))
                token_ids.extend(message.token_ids)
                completion = message.completion
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        speculation = completion.speculation
        return Sample(
            mode=task.mode,
            temperature=task.temperature,
            prompt_index=task.prompt_index,
            token_ids=tuple(token_ids),
            rounds=tuple(item for item in rounds if item.num_tokens),
            num_drafted_by_level=tuple(speculation.num_drafted_by_level),
            num_accepted_by_level=tuple(speculation.num_accepted_by_level),
            num_drafter_failures=speculation.num_drafter_failures,
            time_to_first_token_s=rounds[0].arrival_s,
            num_accepted_by_source=_accepted_by_source(speculation),
            num_ahead_hits=speculation.num_ahead_hits,
            num_ahead_misses=speculation.num_ahead_misses,
        )


def _accepted_by_source(speculation: pb.SpeculationStatistics) -> tuple[tuple[DraftSources, int], ...]:
    return tuple(
        (sources_from_pb([entry.source]) or NO_SOURCES, entry.num_accepted_tokens) for entry in speculation.sources
    )


def _describe(model: types_pb2.ModelInfo) -> str:
    return f"{model.name}, {model.num_parameters / 1e6:.1f} M parameters, {model.num_layers} layers, {model.dtype}"


def _request(task: Task) -> pb.GenerateRequest:
    plan = task.mode.layer_plan
    return pb.GenerateRequest(
        text=task.prompt,
        sampling=types_pb2.SamplingParameters(temperature=task.temperature, seed=task.seed),
        # Every completion is equally long, whatever the model would have stopped at.
        stop=types_pb2.StopConditions(max_tokens=task.max_tokens, ignore_eos=True),
        speculation=pb.SpeculationParameters(
            mode=_Mode.MODE_ON if plan else _Mode.MODE_OFF,
            budget=budget_to_pb(task.budget) if task.budget else None,
            layer_plan=layer_plan_to_pb(plan) if plan else None,
            sources=sources_to_pb(task.mode.sources) if plan else None,
            draft_ahead=task.draft_ahead,
        ),
    )


def _round_from_pb(message: pb.GenerateResponse, arrival_s: float) -> Round:
    timings = message.timings
    return Round(
        arrival_s=arrival_s,
        num_tokens=len(message.token_ids),
        num_accepted=message.num_accepted,
        num_draft_tokens=timings.num_draft_tokens,
        num_draft_levels=timings.num_draft_levels,
        num_fuzzy_steps=timings.num_fuzzy_steps,
        draft_ns=timings.draft_ns,
        calibrate_ns=timings.calibrate_ns,
        fuzzy_ns=timings.fuzzy_ns,
        verify_ns=timings.verify_ns,
        compute_ns=timings.compute_ns,
        round_ns=timings.round_ns,
    )
