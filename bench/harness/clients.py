"""The running services as benchmarks see them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from contextlib import AbstractAsyncContextManager

import grpc

from bench.harness.streams import Counts, Outcome, Round, Stream, Task
from easyspec.cli.clients import verifier_info
from easyspec.errors import CapacityError, EasyspecError, UnavailableError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.convert import budget_to_pb, layer_plan_to_pb, sources_from_pb, sources_to_pb
from easyspec.rpc.errors import error_from_rpc, has_retry_hint
from easyspec.speculation.sources import NO_SOURCES
from easyspec.v1 import generation_pb2 as pb
from easyspec.v1 import generation_pb2_grpc, types_pb2

_INFO_TIMEOUT_S = 10.0
_ROUND_FIELDS = {field.name for field in dataclasses.fields(Round)}


class GatewayClient(AbstractAsyncContextManager["GatewayClient"]):
    """Make it inside the event loop that uses it. `timeout_s` is each request's deadline. `model` empty asks the
    gateway's first one."""

    def __init__(self, address: str, timeout_s: float = 600.0, model: str = "") -> None:
        self._channel = open_channel(address)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._timeout_s = timeout_s
        self._model = model

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def info(self, *, needs_drafter: bool = False) -> pb.GetServerInfoResponse:
        """The gateway's state; raises EasyspecError, also if it has no drafter that it may use and needs one."""
        try:
            info = await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=_INFO_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        if needs_drafter and info.drafter_state != pb.GetServerInfoResponse.PEER_STATE_READY:
            state = pb.GetServerInfoResponse.PeerState.Name(info.drafter_state)
            raise UnavailableError(f"the drafter is {state}; a decode benchmark needs it READY")
        return info

    async def complete(self, task: Task) -> Stream:
        """The whole completion; raises EasyspecError if it fails."""
        stream = Stream(task, 0)
        await self.run(stream)
        if stream.error is not None:
            raise stream.error
        return stream

    async def run(self, stream: Stream) -> None:
        """Ask for `stream.task` and record into `stream` what comes; never raises but when it is cancelled."""
        stream.started_s = time.perf_counter()
        call = self._stub.Generate(_request(stream.task, self._model), timeout=self._timeout_s)
        try:
            async for message in call:
                timings = {field.name: value for field, value in message.timings.ListFields()}
                known = {name: value for name, value in timings.items() if name in _ROUND_FIELDS}
                num_tokens = len(message.token_ids)
                stream.rounds.append(Round(time.perf_counter(), num_tokens, message.num_accepted, **known))
                stream.token_ids.extend(message.token_ids)
                if message.HasField("completion"):
                    statistics = message.completion.speculation
                    stream.counts = Counts(
                        num_drafted_by_level=tuple(statistics.num_drafted_by_level),
                        num_accepted_by_level=tuple(statistics.num_accepted_by_level),
                        num_accepted_by_source=tuple(
                            (sources_from_pb([entry.source]) or NO_SOURCES, entry.num_accepted_tokens)
                            for entry in statistics.sources
                        ),
                        num_drafter_failures=statistics.num_drafter_failures,
                        num_ahead_hits=statistics.num_ahead_hits,
                        num_ahead_misses=statistics.num_ahead_misses,
                    )
            stream.outcome = Outcome.COMPLETE
        except grpc.aio.AioRpcError as rpc_error:
            stream.error = error_from_rpc(rpc_error)
            stream.outcome = Outcome.FAILED
            if isinstance(stream.error, CapacityError):
                stream.outcome = Outcome.REFUSED
                stream.retry_after_s = stream.error.retry_after_s if has_retry_hint(rpc_error) else None
        except asyncio.CancelledError:
            stream.outcome = Outcome.CUT
            raise
        finally:
            stream.ended_s = time.perf_counter()
            call.cancel()


async def kv_use(verifier_address: str) -> float | None:
    """Used slots / all slots of the verifier's KV pool; None if it cannot be asked."""
    try:
        kv = (await verifier_info(verifier_address)).kv
    except EasyspecError:
        return None
    return kv.num_used_slots / kv.num_slots if kv.num_slots else None


def describe_model(model: types_pb2.ModelInfo) -> str:
    return f"{model.name}, {model.num_parameters / 1e6:.1f} M parameters, {model.num_layers} layers, {model.dtype}"


def _request(task: Task, model: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=model,
        text=task.prompt,
        sampling=types_pb2.SamplingParameters(temperature=task.temperature, seed=task.seed),
        # The length is the benchmark's, whatever the model would have stopped at.
        stop=types_pb2.StopConditions(max_tokens=task.max_tokens, ignore_eos=True),
        speculation=pb.SpeculationParameters(
            mode=pb.SpeculationParameters.Mode.Value(f"MODE_{task.speculation.name}"),
            budget=budget_to_pb(task.budget) if task.budget else None,
            layer_plan=layer_plan_to_pb(task.layer_plan) if task.layer_plan else None,
            sources=sources_to_pb(task.sources) if task.sources else None,
            draft_ahead=task.draft_ahead,
        ),
    )
