"""The running services as benchmarks see them."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

import grpc

from bench.harness.streams import Counts, Outcome, Round, Speculation, Stream, Task
from easyspec.errors import CapacityError, UnavailableError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.convert import budget_to_pb, layer_plan_to_pb, sources_from_pb, sources_to_pb
from easyspec.rpc.errors import error_from_rpc, has_retry_hint
from easyspec.speculation.sources import NO_SOURCES
from easyspec.v1 import generation_pb2 as pb
from easyspec.v1 import generation_pb2_grpc, types_pb2, verifier_pb2, verifier_pb2_grpc

_INFO_TIMEOUT_S = 10.0
_PROBE_TIMEOUT_S = 2.0
_Mode = pb.SpeculationParameters.Mode
_MODES = {
    Speculation.OFF: _Mode.MODE_OFF,
    Speculation.ON: _Mode.MODE_ON,
    Speculation.AUTO: _Mode.MODE_AUTO,
}


class GatewayClient:
    """Async context manager; make it inside the event loop that uses it. `timeout_s` is each request's deadline.

    `model` empty asks the gateway's first one.
    """

    def __init__(self, address: str, timeout_s: float = 600.0, model: str = "") -> None:
        self._channel = open_channel(address)
        self._stub = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._timeout_s = timeout_s
        self._model = model

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    async def complete(self, task: Task, index: int = 0) -> Stream:
        """The whole completion; raises EasyspecError if it fails."""
        stream = Stream(task, index)
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
                stream.rounds.append(_round_from_pb(message))
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


class VerifierProbe:
    """How much of the verifier's KV pool is in use; nothing is known without an address."""

    def __init__(self, address: str | None) -> None:
        self._channel = open_channel(address) if address is not None else None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._channel is not None:
            await self._channel.close()

    async def kv_use(self) -> float | None:
        """Used slots / all slots; None if the verifier cannot be asked."""
        if self._channel is None:
            return None
        stub = verifier_pb2_grpc.VerifierServiceStub(self._channel)
        try:
            info = await stub.GetVerifierInfo(verifier_pb2.GetVerifierInfoRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None
        return info.kv.num_used_slots / info.kv.num_slots if info.kv.num_slots else None


def describe_model(model: types_pb2.ModelInfo) -> str:
    """Name, size, layers and type."""
    return f"{model.name}, {model.num_parameters / 1e6:.1f} M parameters, {model.num_layers} layers, {model.dtype}"


def _request(task: Task, model: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=model,
        text=task.prompt,
        sampling=types_pb2.SamplingParameters(temperature=task.temperature, seed=task.seed),
        # The length is the benchmark's, whatever the model would have stopped at.
        stop=types_pb2.StopConditions(max_tokens=task.max_tokens, ignore_eos=True),
        speculation=pb.SpeculationParameters(
            mode=_MODES[task.speculation],
            budget=budget_to_pb(task.budget) if task.budget else None,
            layer_plan=layer_plan_to_pb(task.layer_plan) if task.layer_plan else None,
            sources=sources_to_pb(task.sources) if task.sources else None,
            draft_ahead=task.draft_ahead,
        ),
    )


def _round_from_pb(message: pb.GenerateResponse) -> Round:
    timings = message.timings
    return Round(
        at_s=time.perf_counter(),
        num_tokens=len(message.token_ids),
        num_accepted=message.num_accepted,
        num_draft_tokens=timings.num_draft_tokens,
        num_batch_rows=timings.num_batch_rows,
        num_batch_sessions=timings.num_batch_sessions,
        num_draft_levels=timings.num_draft_levels,
        num_fuzzy_steps=timings.num_fuzzy_steps,
        draft_ns=timings.draft_ns,
        calibrate_ns=timings.calibrate_ns,
        fuzzy_ns=timings.fuzzy_ns,
        verify_ns=timings.verify_ns,
        compute_ns=timings.compute_ns,
        round_ns=timings.round_ns,
    )
