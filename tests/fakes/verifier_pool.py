"""Replicas of a verifier in this process that fail as they are told, and sessions at them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from easyspec.errors import (
    EasyspecError,
)
from easyspec.speculation.messages import ModelInfo, OpenVerification, Verdict, VerifyTimings
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from gateway.decode_loop import TimedVerdict
from gateway.peers.peer import ExponentialBackoff, Peer, PeerInfo, PeerPolicy
from gateway.peers.replica_set import Replica, ReplicaSet
from gateway.peers.verify_session import FailoverLimits, ResilientVerifySession, VerifierPool, VerifyConnection

OPENING = OpenVerification((1, 2, 3), SamplingParameters(seed=1), StopConditions(), num_top_logprobs=0)
FINGERPRINT = "0e11"
BACKOFF = ExponentialBackoff(0.02, 0.04)


def info_of(fingerprint: str = FINGERPRINT, max_tree_nodes: int = 64) -> PeerInfo:
    return PeerInfo(ModelInfo("base", 100, 512, "t0", 1, "float32", (0,), 2, fingerprint), max_tree_nodes)


@dataclass
class FakeConnection:
    """Says the position for a token, unless the next of `faults` (None: no fault) is to be raised instead."""

    faults: list[EasyspecError | None] = field(default_factory=list)
    lasting: EasyspecError | None = None
    openings: list[OpenVerification] = field(default_factory=list)
    timeouts_s: list[float] = field(default_factory=list)
    num_open: int = 0
    ahead: list[int] = field(default_factory=list)

    @asynccontextmanager
    async def open(self, opening: OpenVerification, timeout_s: float) -> AsyncIterator[FakeConnection]:
        self.openings.append(opening)
        self.timeouts_s.append(timeout_s)
        self.num_open += 1
        try:
            yield self
        finally:
            self.num_open -= 1

    async def verify(self, base_length: int, tree: TokenTree, num_plain_rounds: int = 0) -> TimedVerdict:
        self.ahead.append(num_plain_rounds)
        fault = self.faults.pop(0) if self.faults else self.lasting
        if fault is not None:
            raise fault
        return TimedVerdict(Verdict(base_length, (base_length,), ()), VerifyTimings(0, 0, 1, 1), 5)


def replica_of(connection: FakeConnection, address: str, info: PeerInfo) -> Replica[VerifyConnection]:
    async def fetch() -> PeerInfo:
        return info

    peer = Peer(address, fetch, "t0", PeerPolicy(1.0, BACKOFF))
    return Replica(address, peer, connection)


async def pool_of(
    *connections: FakeConnection, infos: tuple[PeerInfo, ...] = (), reopen_timeout_s: float = 0.5
) -> VerifierPool:
    replicas = [
        replica_of(connection, str(index), infos[index] if infos else info_of())
        for index, connection in enumerate(connections)
    ]
    replica_set = ReplicaSet("verifier", replicas)
    await replica_set.probe()
    return VerifierPool(replica_set, FailoverLimits(0.1, reopen_timeout_s, BACKOFF))


async def rounds(session: ResilientVerifySession, num_rounds: int, start: int = 3) -> list[int]:
    answers = [await session.verify(start + index, EMPTY_TREE) for index in range(num_rounds)]
    return [answer.verdict.token_ids[0] for answer in answers]
