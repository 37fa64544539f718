"""The replicas of one role: which can be used, which model they serve, and which is next."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from array import array
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, Generic, TypeVar

import structlog

from easyspec.errors import ConnectionLostError, UnavailableError
from easyspec.speculation.messages import ModelInfo
from gateway.peers.peer import Peer, PeerInfo, PeerState

# A round that began before the probe that found its replica silent has waited longer.
_SILENT_S = 2.0
# Lengths of a prompt's beginnings, in tokens. What is shorter than the first has nothing worth meeting for.
_BEGINNINGS = (64, 256, 1024)
# A replica may have so many times its share of the sessions before prompts that prefer it go elsewhere.
_MAX_SHARE = 1.25

_log = structlog.get_logger()
_ClientT = TypeVar("_ClientT")


@dataclass(eq=False)
class Replica(Generic[_ClientT]):
    """One address of a role: what is known about it, how to talk to it, and how many sessions of ours it has.

    Behind a name that stands for several processes (`dns:///`) gRPC chooses among them.
    """

    address: str
    peer: Peer
    client: _ClientT
    num_sessions: int = 0
    _waits: dict[asyncio.Timeout, float] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def waiting(self, bound_s: float | None = None) -> AsyncIterator[None]:
        """Around an await of this replica's answer; ConnectionLostError if it does not come within `bound_s` seconds,
        or is not worth waiting for any more."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(bound_s) as wait:
                self._waits[wait] = loop.time()
                try:
                    yield
                finally:
                    del self._waits[wait]
        except TimeoutError:
            raise ConnectionLostError(f"{self.address} does not answer") from None

    def hurry(self, *, is_pointless: bool) -> None:
        """End what waits for this replica, but for what has just begun; or, if it is not pointless, let it wait."""
        now_s = asyncio.get_running_loop().time() if self._waits else 0.0
        for wait, began_s in self._waits.items():
            if not wait.expired():  # rescheduling an expired timeout raises
                wait.reschedule(max(now_s, began_s + _SILENT_S) if is_pointless else None)


class ReplicaSet(Generic[_ClientT]):
    """All replicas of a role; to callers that only ask whether the role can be used, one peer.

    One lost replica is not a lost role: the set is ready while any replica is. New requests are for the model that is
    in force, which is the first one found and stays so while any ready replica serves it.
    """

    def __init__(self, role: str, replicas: Sequence[Replica[_ClientT]]) -> None:
        self._role = role
        self.replicas = tuple(replicas)
        for replica in self.replicas:
            replica.peer.when_changed = self._hurry
        self._turns = itertools.count()
        self._in_force: PeerInfo | None = None
        self._begun: dict[str, ModelInfo] = {}  # models that have been in force, by fingerprint

    @property
    def state(self) -> PeerState:
        states = {replica.peer.state for replica in self.replicas}
        return next(state for state in (PeerState.READY, PeerState.REFUSED, PeerState.UNREACHABLE) if state in states)

    @property
    def is_ready(self) -> bool:
        return self.state is PeerState.READY

    @property
    def info(self) -> PeerInfo | None:
        """Of the model in force, with the tree size that all its ready replicas take; None before the first answer."""
        ready = [replica.peer.info for replica in self.replicas if replica.peer.is_ready and replica.peer.info]
        if not ready:
            return self._in_force or next((replica.peer.info for replica in self.replicas if replica.peer.info), None)
        in_force = self._in_force or ready[0]
        same = [info for info in ready if info.model.fingerprint == in_force.model.fingerprint]
        if not same:
            _log.warning("model_changed", role=self._role, model=ready[0].model.name)
            same = [info for info in ready if info.model.fingerprint == ready[0].model.fingerprint]
        self._in_force = replace(same[0], max_tree_nodes=min(info.max_tree_nodes for info in same))
        self._begun[self._in_force.model.fingerprint] = self._in_force.model
        return self._in_force

    def pick(
        self, fingerprint: str = "", avoiding: Collection[Replica[_ClientT]] = (), prompt: Sequence[int] = ()
    ) -> Replica[_ClientT]:
        """The ready replica for prompts that begin like `prompt`, else the one with the fewest sessions, in turn among
        equals; UnavailableError if all are refused.

        With a `fingerprint` only replicas that serve this model. Replicas in `avoiding` are the last choice, and those
        that did not answer lately are a better one than none: what is known may be old.
        """
        fitting = [replica for replica in self.replicas if _may_serve(replica.peer, fingerprint)]
        if not fitting:
            raise UnavailableError(self.misfit(fingerprint) or f"no {self._role} serves the requested model")
        ready = [replica for replica in fitting if replica.peer.is_ready] or fitting
        fresh = [replica for replica in ready if replica not in avoiding] or ready
        if len(fresh) > 1 and (found := preferred(fresh, prompt)) is not None:
            return found
        # Rotated, as `min` takes the first of equals: so replicas with as many sessions take turns.
        turn = next(self._turns) % len(fresh)
        return min(fresh[turn:] + fresh[:turn], key=lambda replica: replica.num_sessions)

    def misfit(self, fingerprint: str) -> str | None:
        """Why the replicas that are ready may not serve a session of this model, if they serve others; no addresses."""
        infos = [replica.peer.info for replica in self.replicas if replica.peer.is_ready]
        others = [info.model for info in infos if info is not None and info.model.fingerprint != fingerprint]
        begun = self._begun.get(fingerprint)
        if begun is None or not others or len(others) < len(infos):
            return None
        served = " and ".join(sorted({_described(model) for model in others}))
        difference = "other weights or settings" if _described(begun) == served else "other bits"
        return (
            f"the stream began on {_described(begun)}; {self._role}s that are ready serve {served}, which has "
            f"{difference} and must not continue it"
        )

    def has_other(self, fingerprint: str, avoiding: Collection[Replica[_ClientT]]) -> bool:
        """Whether a ready replica that serves this model is not among `avoiding`."""
        return any(
            replica.peer.is_ready and _may_serve(replica.peer, fingerprint) and replica not in avoiding
            for replica in self.replicas
        )

    def _hurry(self) -> None:
        """A replica that hangs keeps its streams: they go to another one as soon as there is one."""
        for replica in self.replicas:
            fingerprint = replica.peer.info.model.fingerprint if replica.peer.info is not None else ""
            is_lost = replica.peer.state is PeerState.UNREACHABLE
            replica.hurry(is_pointless=is_lost and self.has_other(fingerprint, {replica}))

    async def probe(self) -> None:
        await asyncio.gather(*(replica.peer.probe() for replica in self.replicas))

    async def wait_for_answer(self) -> None:
        """Return when one of them has answered, whether it can be used or not."""
        await first_done(*(replica.peer.wait_for_answer() for replica in self.replicas))

    async def watch(self) -> None:
        """Keep every replica's state true until cancelled."""
        await asyncio.gather(*(replica.peer.watch() for replica in self.replicas))


def preferred(replicas: Sequence[Replica[_ClientT]], prompt: Sequence[int]) -> Replica[_ClientT] | None:
    """The replica for a prompt by rendezvous hashing, bounded by load; None if the prompt is short, or if the replicas
    for its beginnings have enough to do.

    All prompts with one beginning prefer one replica, whichever gateway asks. Where that has more than its share,
    prompts with a longer beginning in common still meet at another.
    """
    most = math.ceil(_MAX_SHARE * (sum(replica.num_sessions for replica in replicas) + 1) / len(replicas))

    def score(replica: Replica[_ClientT]) -> bytes:
        key = blake2b(replica.address.encode(), digest_size=32).digest()
        return blake2b(beginning, digest_size=8, key=key).digest()

    for length in _BEGINNINGS:
        if len(prompt) < length:
            return None
        beginning = array("q", prompt[:length]).tobytes()
        best = max(replicas, key=score)
        if best.num_sessions < most:
            return best
    return None


async def first_done(*waits: Coroutine[Any, Any, None]) -> None:
    """Return when one of them has, and cancel the others."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _described(model: ModelInfo) -> str:
    """What decides its bits, as far as it has a name."""
    return " ".join(filter(None, (model.name, model.executor, model.weight_format or model.dtype)))


def _may_serve(peer: Peer, fingerprint: str) -> bool:
    if peer.state is PeerState.REFUSED:
        return False
    return not fingerprint or peer.info is None or peer.info.model.fingerprint == fingerprint
