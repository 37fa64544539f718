"""When a drafting session is opened again and when not, without a network."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from easyspec.errors import ConnectionLostError, DeadlineError, EasyspecError
from easyspec.speculation.messages import Calibration, Draft, ModelInfo, OpenSpeculation
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from gateway.draft_session import DraftConnection, DrafterPool, DraftLimits
from gateway.peers import ExponentialBackoff, Peer, PeerInfo, PeerPolicy
from gateway.replicas import Replica, ReplicaSet

NO_PAUSE = ExponentialBackoff(0.0, 0.0)


@dataclass
class LostStream:
    """A session at a drafter that fails whenever it is asked for a draft."""

    fault: EasyspecError
    committed_length: int

    async def draft(self, calibration: Calibration) -> Draft:
        raise self.fault

    def cancel(self) -> None: ...


@dataclass
class LosingConnection:
    fault: EasyspecError
    num_opened: int = 0

    def open(self, opening: OpenSpeculation) -> LostStream:
        self.num_opened += 1
        return LostStream(self.fault, len(opening.prompt_token_ids))


@pytest.mark.parametrize(("fault", "most"), [(ConnectionLostError("its process ended"), 2), (DeadlineError("late"), 6)])
async def test_a_request_that_ends_two_drafters_goes_on_without(fault: EasyspecError, most: int) -> None:
    async def fetch() -> PeerInfo:
        return PeerInfo(ModelInfo("draft", 100, 512, "t0", 1, "float32", (0,), 2), 64)

    connection = LosingConnection(fault)
    replica: Replica[DraftConnection] = Replica(
        "0", Peer("drafter", fetch, "t0", PeerPolicy(1.0, NO_PAUSE)), connection
    )
    pool = DrafterPool(ReplicaSet("drafter", [replica]), DraftLimits(1.0, 1.0, NO_PAUSE))
    await replica.peer.probe()
    async with pool.session(OpenSpeculation((1, 2), SamplingParameters(seed=1)), 100) as session:
        for base_length in range(2, 8):
            assert not (await session.draft(Calibration(base_length, (5,), TreeBudget(1, 1, 1)))).tree.token_ids
            await asyncio.sleep(0)  # the session that is opened again in the background fails as well
            await asyncio.sleep(0)
            await replica.peer.probe()  # the drafter was started again
    assert connection.num_opened == most
