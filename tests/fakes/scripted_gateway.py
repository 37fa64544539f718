"""A gateway that answers every request with the same scripted rounds, over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from easyspec.errors import EasyspecError
from easyspec.rpc.errors import abort
from easyspec.v1 import generation_pb2 as pb
from easyspec.v1 import generation_pb2_grpc, types_pb2


class ScriptedGateway(generation_pb2_grpc.GenerationServiceServicer):
    """`rounds` are the token ids of each round; `requests` collects what clients asked.

    The text of a token is its entry in `token_texts`, if there is one. While `gate` is closed, answers stop after
    their first round. `num_cancelled` counts answers whose client went away.
    """

    def __init__(self, rounds: Sequence[Sequence[int]], drafter_state: int) -> None:
        self.rounds = rounds
        self.drafter_state = drafter_state
        self.requests: list[pb.GenerateRequest] = []
        self.token_texts: dict[int, str] = {}
        self.num_cancelled = 0
        self.error: EasyspecError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # noqa: N802
        self.requests.append(request)
        if self.error is not None:
            await abort(context, self.error, "scripted")
        is_complete = False
        try:
            for index in range(len(self.rounds)):
                yield self._round(index, request)
                await self.gate.wait()
            is_complete = True
        finally:
            self.num_cancelled += not is_complete

    def _round(self, index: int, request: pb.GenerateRequest) -> pb.GenerateResponse:
        token_ids = self.rounds[index]
        drafted = request.speculation.mode in (pb.SpeculationParameters.MODE_ON, pb.SpeculationParameters.MODE_AUTO)
        texts = [self.token_texts[token_id] for token_id in token_ids if token_id in self.token_texts]
        message = pb.GenerateResponse(
            token_ids=token_ids,
            num_accepted=len(token_ids) - 1 if drafted else 0,
            text="".join(texts),
            token_texts=texts,
        )
        message.timings.round_ns = 9_000_000
        message.timings.verify_ns = 4_000_000
        if drafted and index:
            message.timings.draft_ns = 3_000_000
            message.timings.fuzzy_ns = 2_000_000
            message.timings.num_fuzzy_steps = 4
            message.timings.num_draft_levels = 3
        if index == len(self.rounds) - 1:
            message.completion.speculation.num_drafted_by_level.extend([2, 2, 1])
            message.completion.speculation.num_accepted_by_level.extend([2, 1])
        return message

    async def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:  # noqa: N802
        model = types_pb2.ModelInfo(name="tiny", num_parameters=2_500_000, num_layers=4, dtype="float32")
        return pb.GetServerInfoResponse(
            models=[model],
            draft_model=model,
            drafter_state=self.drafter_state,  # type: ignore[arg-type]
            default_budget=types_pb2.TreeBudget(num_levels=5, width=4, num_nodes=16),
        )


@asynccontextmanager
async def serve_scripted_gateway(
    rounds: Sequence[Sequence[int]], drafter_state: int = pb.GetServerInfoResponse.PEER_STATE_READY
) -> AsyncIterator[tuple[ScriptedGateway, str]]:
    """Yield the gateway and its address."""
    gateway = ScriptedGateway(rounds, drafter_state)
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(gateway, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield gateway, f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)
