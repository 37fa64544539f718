from __future__ import annotations

from gateway.peers.peer import PeerState
from tests.fakes.verifier_pool import (
    FakeConnection,
    info_of,
    pool_of,
)


async def test_one_ready_replica_makes_a_ready_set() -> None:
    pool = await pool_of(FakeConnection(), FakeConnection())
    first, second = pool.replicas.replicas
    first.peer.report_failure("gone")
    assert pool.replicas.state is PeerState.READY
    assert {pool.replicas.pick() for _ in range(4)} == {second}
    second.peer.report_failure("gone")
    assert pool.replicas.state is PeerState.UNREACHABLE
    assert {pool.replicas.pick() for _ in range(4)} == {first, second}  # what is known may be old


async def test_prompts_that_begin_alike_meet_at_one_replica() -> None:
    pool = await pool_of(*(FakeConnection() for _ in range(3)))
    homes = {pool.replicas.pick(prompt=[*range(100), other]) for other in range(20)}
    assert len(homes) == 1
    assert len({pool.replicas.pick(prompt=[other] * 100) for other in range(20)}) > 1
    (home,) = homes
    assert pool.replicas.pick(avoiding=[home], prompt=range(100)) is not home


async def test_the_model_in_force_stays_while_anyone_serves_it() -> None:
    pool = await pool_of(*(FakeConnection() for _ in range(3)), infos=(info_of("b"), info_of("a"), info_of("b")))
    replicas = pool.replicas
    assert replicas.info is not None
    assert replicas.info.model.fingerprint == "b"
    first, other, last = replicas.replicas
    assert {replicas.pick("b") for _ in range(4)} == {first, last}
    first.peer.report_failure("gone")
    assert replicas.info.model.fingerprint == "b"
    last.peer.report_failure("gone")
    assert replicas.info.model.fingerprint == "a"
    assert {replicas.pick("a") for _ in range(4)} == {other}


async def test_trees_fit_every_replica() -> None:
    pool = await pool_of(FakeConnection(), FakeConnection(), infos=(info_of(max_tree_nodes=64), info_of("0e11", 32)))
    assert pool.replicas.info == info_of(max_tree_nodes=32)
