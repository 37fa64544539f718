"""What the gateway knows about the services behind it: which of them answer, and which must not be used."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from easyspec.errors import EasyspecError
from easyspec.speculation.messages import KvUsage, ModelInfo

_log = structlog.get_logger()


class PeerState(enum.Enum):
    """Whether a service can be used."""

    UNREACHABLE = "unreachable"
    READY = "ready"
    REFUSED = "refused"


@dataclass(frozen=True)
class PeerInfo:
    """The model behind a service, the most nodes it takes in a tree, its KV memory when it was asked, and what tells
    its process from those before and after it ("": nothing does)."""

    model: ModelInfo
    max_tree_nodes: int
    kv: KvUsage | None = None
    instance_id: str = ""


# Seconds to wait after so many failures in a row.
Backoff: TypeAlias = Callable[[int], float]


@dataclass(frozen=True)
class ExponentialBackoff:
    """Doubles from `first_s` up to `max_s`, in seconds."""

    first_s: float
    max_s: float

    def __call__(self, num_failures: int) -> float:
        return min(self.max_s, self.first_s * 2.0 ** min(num_failures - 1, 30)) if num_failures else 0.0


@dataclass(frozen=True)
class JitteredBackoff:
    """Another backoff's pause, shortened at random by up to half, so that waiting tries do not all come at once."""

    backoff: Backoff

    def __call__(self, num_failures: int) -> float:
        return self.backoff(num_failures) * random.uniform(0.5, 1.0)


@dataclass(frozen=True)
class PeerPolicy:
    """How a peer is watched: seconds between probes of a ready one, and pauses while it fails.

    A ready peer is refused after more than `num_tolerated_misfits` answers in a row that do not fit: behind a name
    with several replicas one of them may have been set up wrongly.
    """

    probe_interval_s: float
    backoff: Backoff
    num_tolerated_misfits: int = 0


class Peer:
    """One service behind the gateway. All requests share what one of them, or a probe, has learned about it.

    `fetch_info` asks the service who it is and raises EasyspecError if it does not answer. A peer whose tokenizer
    differs from `fingerprint` is refused, with `explain_misfit` saying why (kept in `misfit`); probing goes on, for it
    may be replaced by one that fits. `when_changed` is called with every change of `state`.
    """

    def __init__(
        self,
        role: str,
        fetch_info: Callable[[], Awaitable[PeerInfo]],
        fingerprint: str,
        policy: PeerPolicy,
        explain_misfit: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        self._role = role
        self._fetch_info = fetch_info
        self._fingerprint = fingerprint
        self._policy = policy
        self._explain_misfit = explain_misfit
        self._num_failures = 0
        self._num_misfits = 0
        self._failed = asyncio.Event()
        self.when_changed: Callable[[], None] = lambda: None
        self.state = PeerState.UNREACHABLE
        self.info: PeerInfo | None = None
        self.asked_s = -math.inf  # when `info` was asked for, by the monotonic clock
        self.misfit = ""

    @property
    def is_ready(self) -> bool:
        return self.state is PeerState.READY

    async def probe(self) -> None:
        """Ask once, and set `state` and `info` by the answer.

        A session that was lost while the answer was under way knows better: the peer may answer questions and do
        nothing else.
        """
        num_failures, asked_s = self._num_failures, time.monotonic()
        try:
            info = await self._fetch_info()
        except EasyspecError as error:
            self._num_failures += 1
            self._become(PeerState.UNREACHABLE, reason=str(error))
            return
        if self._num_failures > num_failures:
            return  # a session failed after the question was sent
        if info.model.tokenizer_fingerprint != self._fingerprint:
            await self._take_misfit(info, asked_s)
        else:
            self.info, self.asked_s = info, asked_s
            self._num_misfits = 0
            self._failed.clear()
            self._become(PeerState.READY, reason="answers")

    async def _take_misfit(self, info: PeerInfo, asked_s: float) -> None:
        self._num_misfits += 1
        reason = f"tokenizer {info.model.tokenizer_fingerprint}, the gateway's is {self._fingerprint}"
        if self.is_ready and self._num_misfits <= self._policy.num_tolerated_misfits:
            self._failed.clear()
            _log.warning("peer_replica_misfit", peer=self._role, reason=reason)
            return
        if self.state is not PeerState.REFUSED or not self.misfit.startswith(reason):
            explained = reason
            if self._explain_misfit is not None:
                with contextlib.suppress(EasyspecError):  # a version that cannot be asked, or it has just gone
                    explained = f"{reason}: {await self._explain_misfit()}"
            self.misfit = explained
        self.info, self.asked_s = info, asked_s
        self._num_failures += 1
        self._become(PeerState.REFUSED, reason=self.misfit)

    async def wait_for_answer(self) -> None:
        """Probe until the peer answers, whether it can be used or not."""
        await self.probe()
        while self.state is PeerState.UNREACHABLE:
            await self._pause()
            await self.probe()

    async def watch(self) -> None:
        """Keep `state` true until cancelled: probe now and then, and soon after a failure."""
        while True:
            if self.is_ready:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._failed.wait(), self._policy.probe_interval_s)
            if not self.is_ready:
                await self._pause()
            await self.probe()

    async def _pause(self) -> None:
        await asyncio.sleep(self._policy.backoff(self._num_failures))

    def report_failure(self, reason: str) -> None:
        """A session was lost: no other is opened until a probe, after a pause, has found the peer again."""
        if self.is_ready:
            self._num_failures += 1
            self._become(PeerState.UNREACHABLE, reason=reason)
            self._failed.set()

    def suspect(self) -> None:
        """A session was lost, for whatever reason: probe now, to learn whether the peer is."""
        self._failed.set()

    def report_success(self) -> None:
        """A session got its answer in time."""
        self._num_failures = 0

    def _become(self, state: PeerState, reason: str) -> None:
        if state is not self.state:
            log = _log.info if state is PeerState.READY else _log.warning
            log("peer_state", peer=self._role, state=state.value, reason=reason)
            self.state = state  # before the call, which looks at it
            self.when_changed()
