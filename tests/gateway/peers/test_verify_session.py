"""When a session is opened again and when not, without a network."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import structlog

from easyspec.errors import (
    CapacityError,
    ConnectionLostError,
    DeadlineError,
    EasyspecError,
    InvalidRequestError,
    StalePositionError,
    UnavailableError,
    WrongModelError,
)
from easyspec.rpc.errors import retry_hint_s
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from easyspec.usual_time import UsualTime
from gateway.decode_loop import TimedVerdict
from gateway.peers import replica_set as replicas_module
from gateway.peers import verify_session as verify_session_module
from gateway.peers.peer import ExponentialBackoff, Peer, PeerInfo, PeerPolicy
from gateway.peers.replica_set import Replica, ReplicaSet
from gateway.peers.verify_session import FailoverLimits, VerifierPool, VerifyConnection
from tests.fakes.verifier_pool import (
    BACKOFF,
    FINGERPRINT,
    OPENING,
    FakeConnection,
    info_of,
    pool_of,
    rounds,
)


async def test_nothing_lost_is_one_stream_for_the_model_in_force() -> None:
    connection = FakeConnection()
    pool = await pool_of(connection)
    async with pool.open(OPENING, 10) as session:
        assert await rounds(session, 3) == [3, 4, 5]
        assert connection.num_open == 1
    assert (connection.num_open, session.num_failures) == (0, 0)
    (opening,) = connection.openings
    assert opening.model_fingerprint == FINGERPRINT
    assert pool.replicas.replicas[0].num_sessions == 0


async def test_plain_rounds_lost_on_the_way_are_asked_for_anew() -> None:
    connection = FakeConnection([None, UnavailableError("lost")])
    pool = await pool_of(connection)
    async with pool.open(OPENING, 10) as session:
        said = [(await session.verify(3 + index, EMPTY_TREE, 2 - index)).verdict.token_ids[0] for index in range(3)]
    assert said == [3, 4, 5]
    assert connection.ahead == [2, 1, 1, 0]
    assert connection.openings[1].output_token_ids == (3,)


@pytest.mark.parametrize("fault", [UnavailableError("lost"), EasyspecError("a bug"), StalePositionError(3, 4)], ids=str)
async def test_a_lost_round_is_asked_again_from_the_tokens_so_far(fault: EasyspecError) -> None:
    connection = FakeConnection([None, None, fault])
    async with (await pool_of(connection)).open(OPENING, 10) as session:
        assert await rounds(session, 4) == [3, 4, 5, 6]
        assert session.num_failures == 1
        assert connection.num_open == 1
    first, second = connection.openings
    assert (first.output_token_ids, second.output_token_ids) == ((), (3, 4))
    assert first.prompt_token_ids == second.prompt_token_ids
    assert connection.timeouts_s[1] < connection.timeouts_s[0] <= 10


async def test_log_probabilities_of_the_prompt_come_once() -> None:
    connection = FakeConnection([UnavailableError("lost before the first"), None, UnavailableError("and after it")])
    opening = OpenVerification(OPENING.prompt_token_ids, OPENING.sampling, OPENING.stop, (), "", "", 0, True)
    async with (await pool_of(connection)).open(opening, 10) as session:
        await rounds(session, 2)
    assert [opening.prompt_logprobs for opening in connection.openings] == [True, True, False]


@pytest.mark.parametrize(
    "fault", [InvalidRequestError("sampling.top_k", 0, "at least 1"), DeadlineError("too late")], ids=str
)
async def test_what_would_fail_again_is_passed_on_at_once(fault: EasyspecError) -> None:
    connection = FakeConnection([None, fault])
    async with (await pool_of(connection, FakeConnection())).open(OPENING, 10) as session:
        with pytest.raises(type(fault)) as caught:
            await rounds(session, 2)
        assert caught.value is fault
    assert len(connection.openings) == 1


async def test_a_mistake_of_the_client_is_no_lost_session() -> None:
    connection = FakeConnection([InvalidRequestError("sampling.top_k", 0, "at least 1")])
    pool = await pool_of(connection)
    with structlog.testing.capture_logs() as events:
        async with pool.open(OPENING, 10) as session:
            with pytest.raises(InvalidRequestError):
                await rounds(session, 1)
            assert session.num_failures == 0
    assert events == []
    assert (connection.num_open, pool.replicas.replicas[0].num_sessions) == (0, 0)


async def test_a_fault_that_comes_twice_is_passed_on() -> None:
    connection = FakeConnection([None], lasting=EasyspecError("a bug"))
    async with (await pool_of(connection)).open(OPENING, 10) as session:
        with pytest.raises(EasyspecError, match="a bug"):
            await rounds(session, 2)
    assert len(connection.openings) == 2


@pytest.mark.parametrize(("num_before", "least_s"), [(0, 0.0), (1, 0.3)])
async def test_patience_is_for_those_who_have_begun(num_before: int, least_s: float) -> None:
    connection = FakeConnection([None] * num_before, lasting=UnavailableError("gone"))
    async with (await pool_of(connection)).open(OPENING, 10) as session:
        await rounds(session, num_before)
        started_s = time.monotonic()
        with pytest.raises(UnavailableError, match="gone"):
            await session.verify(3 + num_before, EMPTY_TREE)
        assert time.monotonic() - started_s > least_s
        assert session.num_failures == 1
    assert connection.num_open == 0


async def test_nobody_waits_beyond_the_requests_own_deadline() -> None:
    connection = FakeConnection([None], lasting=UnavailableError("gone"))
    async with (await pool_of(connection, reopen_timeout_s=60.0)).open(OPENING, 0.2) as session:
        await rounds(session, 1)
        async with asyncio.timeout(5):
            with pytest.raises(UnavailableError):
                await session.verify(4, EMPTY_TREE)


async def test_another_replica_is_asked_at_once_and_the_lost_one_looked_at() -> None:
    lost, other = FakeConnection([None], lasting=UnavailableError("gone")), FakeConnection()
    pool = await pool_of(lost, other)
    pool.limits = replace(pool.limits, backoff=ExponentialBackoff(60.0, 60.0))  # a pause would be an error
    async with pool.open(OPENING, 10) as session:
        await rounds(session, 1)
        assert await rounds(session, 2, start=4) == [4, 5]
        assert [replica.num_sessions for replica in pool.replicas.replicas] == [0, 1]


async def test_sessions_go_to_the_replica_with_the_fewest() -> None:
    connections = [FakeConnection() for _ in range(3)]
    pool = await pool_of(*connections)
    sessions = [pool.open(OPENING, 10) for _ in range(6)]
    for opened in sessions:
        await rounds(await opened.__aenter__(), 1)
    assert [connection.num_open for connection in connections] == [2, 2, 2]
    for opened in sessions:
        await opened.__aexit__(None, None, None)
    assert [connection.num_open for connection in connections] == [0, 0, 0]


async def test_a_cancelled_wait_leaves_nothing_behind() -> None:
    connection = FakeConnection([None], lasting=UnavailableError("gone"))
    pool = await pool_of(connection, reopen_timeout_s=60.0)

    async def go_on() -> None:
        async with pool.open(OPENING, 60) as session:
            await rounds(session, 2)

    task = asyncio.create_task(go_on())
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert connection.num_open == pool.replicas.replicas[0].num_sessions == 0


async def test_a_full_replica_is_waited_for_as_long_as_it_says() -> None:
    connection = FakeConnection([None, UnavailableError("lost"), CapacityError("full", 0.1)])
    async with (await pool_of(connection)).open(OPENING, 10) as session:
        started_s = time.monotonic()
        assert await rounds(session, 2) == [3, 4]
        assert time.monotonic() - started_s > 0.1


# --- replicas that hang -----------------------------------------------------------------------------------------


@dataclass
class HangingConnection(FakeConnection):
    """Answers no round from the moment that it `hangs`; opens no session if it `hangs_open`."""

    hangs: bool = False
    hangs_open: bool = False

    @asynccontextmanager
    async def open(self, opening: OpenVerification, timeout_s: float) -> AsyncIterator[FakeConnection]:
        if self.hangs_open:
            await asyncio.Event().wait()
        async with super().open(opening, timeout_s):
            yield self

    async def verify(self, base_length: int, tree: TokenTree, num_plain_rounds: int = 0) -> TimedVerdict:
        if self.hangs:
            await asyncio.Event().wait()
        return await super().verify(base_length, tree, num_plain_rounds)


@pytest.mark.parametrize("num_before", [0, 2])
async def test_a_stream_leaves_a_replica_that_hangs_when_a_probe_knows(
    num_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "_SILENT_S", 0.05)
    hanging, other = HangingConnection(hangs_open=num_before == 0), FakeConnection()
    pool = await pool_of(hanging, other)
    async with pool.open(OPENING, 10) as session:
        await rounds(session, num_before)
        hanging.hangs = True
        going_on = asyncio.create_task(rounds(session, 2, start=3 + num_before))
        await asyncio.sleep(0.2)
        assert not going_on.done()  # a step may take long
        pool.replicas.replicas[0].peer.report_failure("the probe was not answered")
        assert await asyncio.wait_for(going_on, 2) == [3 + num_before, 4 + num_before]
    assert (hanging.num_open, other.num_open) == (0, 0)


async def test_without_another_replica_it_waits_and_goes_on_when_there_is_one() -> None:
    hanging, other = HangingConnection(), FakeConnection()
    pool = await pool_of(hanging, other)
    first, second = (replica.peer for replica in pool.replicas.replicas)
    async with pool.open(OPENING, 10) as session:
        await rounds(session, 1)
        second.report_failure("gone")
        hanging.hangs = True
        going_on = asyncio.create_task(rounds(session, 1, start=4))
        await asyncio.sleep(0.01)
        first.report_failure("the probe was not answered")
        await asyncio.sleep(0.1)
        assert not going_on.done()
        await second.probe()
        assert await asyncio.wait_for(going_on, 5) == [4]


async def test_a_round_that_takes_many_times_the_usual_is_asked_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier answers probes, and its device hangs."""
    hanging, other = HangingConnection(), FakeConnection()
    pool = await pool_of(hanging, other)
    pool.round_time = UsualTime(least_bound_s=0.3)
    async with pool.open(OPENING, 10) as session:
        await rounds(session, 2)
        hanging.hangs = True
        started_s = time.monotonic()
        assert await rounds(session, 2, start=5) == [5, 6]
        assert 0.25 < time.monotonic() - started_s < 2


# --- suspects ---------------------------------------------------------------------------------------------------

DEATH = ConnectionLostError("its process ended")


async def test_a_request_that_ends_two_verifiers_is_tried_at_no_third() -> None:
    connections = [FakeConnection(lasting=DEATH) for _ in range(4)]
    pool = await pool_of(*connections)
    with pytest.raises(UnavailableError, match="2 verifiers in a row were lost with this request"):
        async with pool.open(OPENING, 10) as session:
            await rounds(session, 1)
    assert sum(len(connection.openings) for connection in connections) == 2
    assert sum(replica.num_sessions for replica in pool.replicas.replicas) == 0


async def test_it_is_not_tried_where_the_last_replica_serves_others() -> None:
    dying, last = FakeConnection(lasting=DEATH), FakeConnection()
    pool = await pool_of(dying, last)
    dead, alive = pool.replicas.replicas
    dead.peer.suspect = lambda: dead.peer.report_failure("gone")  # type: ignore[method-assign]
    dead.num_sessions += 1
    async with pool.open(OPENING, 10) as other:
        await rounds(other, 1)
        dead.num_sessions -= 1
        async with pool.open(OPENING, 10) as session:
            with pytest.raises(UnavailableError, match="the only one left serves others"):
                await rounds(session, 1)
            assert len(dying.openings) == 1
        assert await rounds(other, 1, start=4) == [4]
        assert (len(last.openings), alive.num_sessions) == (1, 1)
    async with pool.open(OPENING, 10) as session:  # now it serves no other session
        assert await rounds(session, 1) == [3]


async def test_streams_that_have_begun_go_on_at_the_last_replica_all_at_once() -> None:
    dying, last = FakeConnection(), FakeConnection()
    pool = await pool_of(dying, last)
    async with contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(pool.open(OPENING, 10)) for _ in range(6)]
        for session in sessions:
            await rounds(session, 1)
        dying.lasting = DEATH
        assert await asyncio.gather(*(rounds(session, 1, start=4) for session in sessions)) == [[4]] * 6
        assert last.num_open == 6


async def test_a_connection_that_was_cut_is_no_death() -> None:
    """The same processes are there still."""
    infos = tuple(replace(info_of(), instance_id=instance_id) for instance_id in ("first", "second"))
    connections = FakeConnection([DEATH]), FakeConnection([DEATH])
    pool = await pool_of(*connections, infos=infos)
    async with pool.open(OPENING, 10) as session:
        assert await rounds(session, 1) == [3]
        assert session._num_deaths == 0


async def test_a_verifier_that_is_seen_alive_again_did_not_die_of_a_stream() -> None:
    """The machine stood still, probes too."""
    connection, stands_still = FakeConnection(), False

    async def fetch() -> PeerInfo:
        if stands_still:
            raise UnavailableError("no answer")
        return replace(info_of(), instance_id="first")

    replica = Replica[VerifyConnection]("0", Peer("verifier", fetch, "t0", PeerPolicy(1.0, BACKOFF)), connection)
    pool = VerifierPool(ReplicaSet("verifier", [replica]), FailoverLimits(0.1, 0.1, BACKOFF))
    await pool.replicas.probe()
    async with pool.open(OPENING, 10) as session:
        assert await rounds(session, 1) == [3]
        stands_still, connection.lasting = True, DEATH
        with pytest.raises(UnavailableError):
            await rounds(session, 1, start=4)
        assert session._num_deaths > 0
        stands_still = False
        await pool.replicas.probe()
        assert session._num_deaths == 0


async def test_a_suspected_stream_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_session_module, "_SUSPECT_PATIENCE_S", 0.2)
    first, last = FakeConnection(), FakeConnection()
    pool = await pool_of(first, last, reopen_timeout_s=60)
    gone, alive = pool.replicas.replicas
    async with pool.open(OPENING, 100) as other, pool.open(OPENING, 100) as session:
        await rounds(other, 1)
        await rounds(session, 1)
        assert (first.num_open, last.num_open) == (1, 1)
        gone.peer.report_failure("gone")
        last.faults = [DEATH, DEATH]
        there = other if other._replica is alive else session
        alive.num_sessions += 1
        started_s = time.monotonic()
        with pytest.raises(UnavailableError, match="the only one left serves others"):
            await rounds(there, 1, start=4)
        assert 0.1 < time.monotonic() - started_s < 5
        alive.num_sessions -= 1


POISON_SEED = 666


@dataclass
class MortalConnection(FakeConnection):
    """A replica that dies, and is there again at once, with every second round of the session with POISON_SEED."""

    num_deaths: int = 0

    @asynccontextmanager
    async def open(self, opening: OpenVerification, timeout_s: float) -> AsyncIterator[MortalStream]:
        yield MortalStream(self, opening, self.num_deaths)


@dataclass
class MortalStream:
    connection: MortalConnection
    opening: OpenVerification
    num_deaths: int

    async def verify(self, base_length: int, tree: TokenTree, num_plain_rounds: int = 0) -> TimedVerdict:
        if base_length > 3 and self.opening.sampling.seed == POISON_SEED:
            self.connection.num_deaths += 1
        await asyncio.sleep(0.02)
        if self.connection.num_deaths > self.num_deaths:
            raise DEATH
        return await self.connection.verify(base_length, tree, num_plain_rounds)


async def test_a_stream_that_ends_verifiers_ends_alone() -> None:
    connections = [MortalConnection() for _ in range(4)]
    pool = await pool_of(*connections, reopen_timeout_s=5)
    openings = [replace(OPENING, sampling=SamplingParameters(seed=seed)) for seed in (*range(11), POISON_SEED)]
    async with contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(pool.open(opening, 10)) for opening in openings]
        for session in sessions:
            await rounds(session, 1)
        *others, poison = await asyncio.gather(
            *(rounds(session, 2, start=4) for session in sessions), return_exceptions=True
        )
    assert others == [[4, 5]] * 11
    assert isinstance(poison, UnavailableError)
    assert "3 verifiers in a row were lost with this request" in str(poison)
    assert sum(connection.num_deaths for connection in connections) == 3


async def test_a_wrong_model_is_not_a_reason_to_doubt_the_replica() -> None:
    connection = FakeConnection([WrongModelError("0e11", "07h")])
    pool = await pool_of(connection)
    probes: list[Callable[[], None]] = []
    pool.replicas.replicas[0].peer.suspect = lambda: probes.append(lambda: None)  # type: ignore[method-assign]
    async with pool.open(OPENING, 10) as session:
        assert await rounds(session, 1) == [3]
    assert probes == []


async def test_a_verifier_of_another_executor_does_not_continue_a_stream_and_the_error_says_so() -> None:
    connection, executor = FakeConnection(), "native-avx2"

    async def fetch() -> PeerInfo:
        info = info_of(executor)
        return replace(info, model=replace(info.model, executor=executor, weight_format="bfloat16"))

    replica = Replica[VerifyConnection]("0", Peer("verifier", fetch, "t0", PeerPolicy(1.0, BACKOFF)), connection)
    pool = VerifierPool(ReplicaSet("verifier", [replica]), FailoverLimits(0.1, 0.1, BACKOFF))
    await pool.replicas.probe()
    async with pool.open(OPENING, 10) as session:
        assert await rounds(session, 2) == [3, 4]
        executor, connection.lasting = "reference", WrongModelError("native-avx2", "reference")
        await pool.replicas.probe()
        with pytest.raises(
            UnavailableError, match=r"began on base native-avx2 bfloat16;.*base reference bfloat16"
        ) as told:
            await rounds(session, 1, start=5)
    assert retry_hint_s(told.value) is not None
    connection.lasting = None
    async with pool.open(OPENING, 10) as session:  # new ones begin there
        assert await rounds(session, 1) == [3]
