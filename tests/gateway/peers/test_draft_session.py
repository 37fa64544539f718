"""When a drafting session is opened again and when not, without a network."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from easyspec.errors import ConnectionLostError, DeadlineError, EasyspecError
from easyspec.speculation.messages import Calibration, Draft, ModelInfo, OpenSpeculation
from easyspec.speculation.parameters import SamplingParameters, TreeBudget
from easyspec.speculation.token_tree import TokenTree
from gateway.peers.draft_session import DraftConnection, DrafterPool, DraftLimits, DraftPace
from gateway.peers.peer import ExponentialBackoff, Peer, PeerInfo, PeerPolicy
from gateway.peers.replica_set import Replica, ReplicaSet

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


@dataclass
class SlowStream:
    """A session whose drafts take `delay_s` seconds: of the next two positions, the tokens 5 and 6."""

    connection: SlowConnection
    committed_length: int

    async def draft(self, calibration: Calibration) -> Draft:
        delay_s = self.connection.delays_s.pop(0) if self.connection.delays_s else 0.0
        await asyncio.sleep(delay_s)
        self.committed_length += len(calibration.token_ids)
        return Draft(self.committed_length, TokenTree((5, 6), (0, 1)))

    def cancel(self) -> None: ...


@dataclass
class SlowConnection:
    delays_s: list[float] = field(default_factory=list)
    num_opened: int = 0

    def open(self, opening: OpenSpeculation) -> SlowStream:
        self.num_opened += 1
        return SlowStream(self, len(opening.prompt_token_ids))


async def pool_over(connection: DraftConnection, deadline_s: float = 1.0) -> tuple[DrafterPool, Peer]:
    async def fetch() -> PeerInfo:
        return PeerInfo(ModelInfo("draft", 100, 512, "t0", 1, "float32", (0,), 2), 64)

    peer = Peer("drafter", fetch, "t0", PeerPolicy(1.0, NO_PAUSE))
    await peer.probe()
    pool = DrafterPool(ReplicaSet("drafter", [Replica("0", peer, connection)]), DraftLimits(deadline_s, 5.0, NO_PAUSE))
    return pool, peer


OPENING = OpenSpeculation((1, 2), SamplingParameters(seed=1))
BUDGET = TreeBudget(2, 1, 2)


async def test_a_late_draft_costs_its_round_and_is_used_as_far_as_it_fits() -> None:
    connection = SlowConnection([0.15])
    pool, _ = await pool_over(connection, deadline_s=0.05)
    async with pool.session(OPENING, 100) as session:
        trees = []
        for base_length, token_id, pause_s in ((2, 4, 0.0), (3, 9, 0.2), (4, 5, 0.0), (5, 6, 0.0)):
            trees.append((await session.draft(Calibration(base_length, (token_id,), BUDGET))).tree.token_ids)
            await asyncio.sleep(pause_s)
        # Late, not there yet; then what came was for another token than 9, and the drafter is asked again.
        assert trees == [(), (), (5, 6), (5, 6)]
        assert (session.num_failures, connection.num_opened) == (1, 1)
    connection = SlowConnection([0.1])
    pool, _ = await pool_over(connection, deadline_s=0.05)
    async with pool.session(OPENING, 100) as session:
        assert not (await session.draft(Calibration(2, (4,), BUDGET))).tree.token_ids
        await asyncio.sleep(0.1)
        draft = await session.draft(Calibration(3, (5,), BUDGET))
        assert (draft.tree, draft.elapsed_ns) == (TokenTree((6,), (0,)), 0)  # without being asked


async def test_lateness_is_no_failure_while_others_get_their_drafts() -> None:
    connection = SlowConnection()
    pool, peer = await pool_over(connection, deadline_s=0.1)
    async with pool.session(OPENING, 100) as other, pool.session(OPENING, 100) as session:
        connection.delays_s = [0.3, 0.02]
        late = asyncio.create_task(session.draft(Calibration(2, (4,), BUDGET)))
        await asyncio.sleep(0.01)
        assert len((await other.draft(Calibration(2, (4,), BUDGET))).tree) == 2
        assert len((await late).tree) == 0
        assert peer.is_ready
        connection.delays_s = [0.3]
        await other.draft(Calibration(3, (4,), BUDGET))
        assert not peer.is_ready  # no session got any


async def test_the_deadline_follows_what_drafts_take() -> None:
    pace = DraftPace(0.1)
    assert pace.deadline_s == 0.1
    pace.answered(60.0, has_read=False)
    assert pace.deadline_s == 0.1
    for _ in range(200):
        pace.answered(0.03, has_read=True)
    assert 0.5 < pace.deadline_s <= 0.6
    for _ in range(200):
        pace.answered(5.0, has_read=True)
    assert pace.deadline_s == 1.0


@pytest.mark.parametrize(("fault", "most"), [(ConnectionLostError("its process ended"), 2), (DeadlineError("late"), 6)])
async def test_a_request_that_ends_two_drafters_goes_on_without(fault: EasyspecError, most: int) -> None:
    connection = LosingConnection(fault)
    pool, peer = await pool_over(connection)
    async with pool.session(OPENING, 100) as session:
        for base_length in range(2, 8):
            assert not (await session.draft(Calibration(base_length, (5,), TreeBudget(1, 1, 1)))).tree.token_ids
            await asyncio.sleep(0)  # the session that is opened again in the background fails as well
            await asyncio.sleep(0)
            await peer.probe()  # the drafter was started again
    assert connection.num_opened == most
