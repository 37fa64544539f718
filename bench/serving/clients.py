"""The services as the load generator sees them."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

import grpc

from bench.serving.streams import Chunk, Outcome, Stream
from bench.serving.workload import Speculation, Task
from easyspec.errors import CapacityError
from easyspec.rpc.channels import open_channel
from easyspec.rpc.errors import error_from_rpc, has_retry_hint
from easyspec.v1 import generation_pb2 as pb
from easyspec.v1 import generation_pb2_grpc, types_pb2, verifier_pb2, verifier_pb2_grpc

_Mode = pb.SpeculationParameters.Mode
_MODES = {
    Speculation.OFF: _Mode.MODE_OFF,
    Speculation.ON: _Mode.MODE_ON,
    Speculation.AUTO: _Mode.MODE_AUTO,
}


class LoadClient:
    """Async context manager; make it inside the event loop that uses it. `timeout_s` is each request's deadline.

    `model` empty asks the gateway's first one.
    """

    def __init__(self, address: str, timeout_s: float, model: str = "") -> None:
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

    async def info(self) -> pb.GetServerInfoResponse:
        """The gateway's state; raises EasyspecError."""
        try:
            return await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10.0)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def run(self, stream: Stream) -> None:
        """Ask for `stream.task` and record into `stream` what comes; never raises but when it is cancelled."""
        stream.started_s = time.perf_counter()
        call = self._stub.Generate(_request(stream.task, self._model), timeout=self._timeout_s)
        try:
            async for message in call:
                stream.chunks.append(_chunk(message))
                stream.token_ids.extend(message.token_ids)
            stream.outcome = Outcome.COMPLETE
        except grpc.aio.AioRpcError as rpc_error:
            error = error_from_rpc(rpc_error)
            stream.error = f"{rpc_error.code().name}: {error}"
            stream.outcome = Outcome.FAILED
            if isinstance(error, CapacityError):
                stream.outcome = Outcome.REFUSED
                stream.retry_after_s = error.retry_after_s if has_retry_hint(rpc_error) else None
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
            info = await stub.GetVerifierInfo(verifier_pb2.GetVerifierInfoRequest(), timeout=2.0)
        except grpc.aio.AioRpcError:
            return None
        return info.kv.num_used_slots / info.kv.num_slots if info.kv.num_slots else None


def _request(task: Task, model: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model=model,
        text=task.prompt,
        sampling=types_pb2.SamplingParameters(temperature=task.temperature, seed=task.seed),
        # The length is the workload's, whatever the model would have stopped at.
        stop=types_pb2.StopConditions(max_tokens=task.max_tokens, ignore_eos=True),
        speculation=pb.SpeculationParameters(mode=_MODES[task.speculation]),
    )


def _chunk(message: pb.GenerateResponse) -> Chunk:
    timings = message.timings
    return Chunk(
        at_s=time.perf_counter(),
        num_tokens=len(message.token_ids),
        num_accepted=message.num_accepted,
        num_draft_tokens=timings.num_draft_tokens,
        num_batch_rows=timings.num_batch_rows,
        num_batch_sessions=timings.num_batch_sessions,
    )
