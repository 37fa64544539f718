"""Verifying that outlives a verifier: the session is opened again, there or at another replica, from the tokens so far.

Which token comes next is a function of the tokens before it, the sampling parameters and the seed, so a session that
was opened again answers the round that was lost with the verdict that was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import structlog

from easyspec.errors import (
    CapacityError,
    ConnectionLostError,
    EasyspecError,
    EngineLostError,
    InvalidRequestError,
    StalePositionError,
    UnavailableError,
    WrongModelError,
)
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.token_tree import TokenTree
from easyspec.usual_time import UsualTime
from gateway.decode_loop import TimedVerdict, VerifierSession
from gateway.messages.progress import Progress
from gateway.peers.peer import Backoff, Peer
from gateway.peers.replica_set import Replica, ReplicaSet

# A suspected stream ends after so long without a replica to try it at: a healthy one is there, and would be thought to
# serve it.
_SUSPECT_PATIENCE_S = 25.0

_log = structlog.get_logger()


class VerifyConnection(Protocol):
    """Opens a stream at one replica that must be over in `timeout_s` seconds; leaving the context ends it."""

    def open(self, opening: OpenVerification, timeout_s: float) -> AbstractAsyncContextManager[VerifierSession]: ...


@dataclass(frozen=True)
class FailoverLimits:
    """How long a round waits for a lost verifier (seconds): before the first token, after it, and between two tries."""

    open_timeout_s: float
    reopen_timeout_s: float
    backoff: Backoff


class VerifierPool:
    """The verifiers as all requests share them, and how to open a session.

    A session that was open when a verifier died may be why. `trials` is held while one that is suspected in earnest is
    tried: alone, not where the only replica left has other sessions, and once.
    """

    def __init__(self, replicas: ReplicaSet[VerifyConnection], limits: FailoverLimits) -> None:
        self.replicas = replicas
        self.limits = limits
        self.trials = asyncio.Lock()
        self.round_time = UsualTime()

    @contextlib.asynccontextmanager
    async def open(
        self, opening: OpenVerification, timeout_s: float, progress: Progress | None = None
    ) -> AsyncIterator[ResilientVerifySession]:
        """A session for one request that must be over in `timeout_s` seconds, freed at the verifier on exit.

        `progress` stalls while the verifier is lost.
        """
        info = self.replicas.info
        if info is not None:
            opening = replace(opening, model_fingerprint=info.model.fingerprint)
        session = ResilientVerifySession(self, opening, timeout_s, progress or Progress())
        try:
            yield session
        finally:
            await session.close()


class ResilientVerifySession:
    """A VerifierSession that outlives the verifier.

    A lost stream is opened again from prompt and output so far, and asked again for the round that was lost: what
    comes out is what would have come out. Raises EasyspecError where that does not help (a request that is refused
    would be refused again) or takes longer than the limits allow. `num_failures` counts the rounds that met a failure.
    """

    def __init__(self, pool: VerifierPool, opening: OpenVerification, timeout_s: float, progress: Progress) -> None:
        self._progress = progress
        self._replicas = pool.replicas
        self._limits = pool.limits
        self._trials = pool.trials
        self._round_time = pool.round_time
        self._has_read = False
        self._is_on_trial = False
        self._deaths: list[_Death] = []
        self._instance_id = ""
        self._opening = opening
        self._deadline_s = time.monotonic() + timeout_s
        self._output = list(opening.output_token_ids)
        self._has_spoken = False
        self._connection = contextlib.AsyncExitStack()
        self._stream: VerifierSession | None = None
        self._replica: Replica[VerifyConnection] | None = None
        self.num_failures = 0

    async def verify(self, base_length: int, tree: TokenTree, num_plain_rounds: int = 0) -> TimedVerdict:
        started_ns = time.monotonic_ns()
        outage: _Outage | None = None
        while True:
            try:
                stream = self._stream or await self._open(outage)
                answer = await self._ask(stream, base_length, tree, num_plain_rounds)
                break
            except InvalidRequestError:  # the client's own mistake
                raise
            except EasyspecError as error:
                if outage is None:
                    self.num_failures += 1
                    self._progress.stall()
                    now_s = time.monotonic()
                    patience_s = self._limits.reopen_timeout_s if self._has_spoken else self._limits.open_timeout_s
                    outage = _Outage(now_s, min(now_s + patience_s, self._deadline_s))
                # Blame first: it asks which replica and stream failed, and losing forgets both.
                await self._blame(outage, error)
                await self._lose(outage, error)
                await self._wait_for_next_try(outage, error)
        self._output.extend(answer.verdict.token_ids)
        self._has_spoken = True
        self._deaths.clear()
        self._end_trial()
        if outage is None:
            return answer
        self._progress.resume()
        assert self._replica is not None, "it has just answered"
        _log.info(
            "verify_session_recovered",
            request_id=self._opening.request_id,
            replica=self._replica.address,
            num_tries=outage.num_failures,
            pause_ms=round((time.monotonic() - outage.started_s) * 1000, 1),
        )
        return replace(answer, elapsed_ns=time.monotonic_ns() - started_ns)

    async def _ask(
        self, stream: VerifierSession, base_length: int, tree: TokenTree, num_plain_rounds: int
    ) -> TimedVerdict:
        """The verdict; ConnectionLostError if the verifier hangs and there is another one."""
        replica = self._replica
        assert replica is not None, "a stream is at a replica"
        # The first round reads the prompt, however long that is.
        has_other = self._has_read and self._replicas.has_other(self._opening.model_fingerprint, {replica})
        async with replica.waiting(self._round_time.bound_s if has_other else None):
            answer = await stream.verify(base_length, tree, num_plain_rounds)
        if self._has_read:
            self._round_time.learn(answer.elapsed_ns / 1e9)
        self._has_read = True
        return answer

    async def close(self) -> None:
        self._stream = None
        self._end_trial()
        replica, self._replica = self._replica, None
        # Counted before the await, which may be cancelled; a second close must not count again.
        if replica is not None:
            replica.num_sessions -= 1
        await self._connection.aclose()

    async def _open(self, outage: _Outage | None) -> VerifierSession:
        fingerprint, prompt = self._opening.model_fingerprint, self._opening.prompt_token_ids
        if outage is None:
            replica = self._replicas.pick(fingerprint, prompt=prompt)
        else:
            if self._is_suspected:
                # Its turn to be tried alone.
                left_s = outage.give_up_s - time.monotonic()
                try:
                    async with asyncio.timeout_at(asyncio.get_running_loop().time() + left_s):
                        await self._trials.acquire()
                except TimeoutError:
                    message = "a verifier was lost with this request, and others are tried before it"
                    raise UnavailableError(message) from None
                self._is_on_trial = True
            replica = self._replicas.pick(fingerprint, outage.tried, prompt)
            outage.tried.add(replica)
            if self._is_suspected and replica.num_sessions and not self._replicas.has_other(fingerprint, outage.tried):
                self._end_trial()
                raise UnavailableError("a verifier was lost with this request, and the only one left serves others")
        # Counted before the await, so that sessions that open at the same time spread; `close` takes it back.
        self._replica = replica
        self._replica.num_sessions += 1
        self._instance_id = replica.peer.info.instance_id if replica.peer.info is not None else ""
        opening = replace(
            self._opening,
            # All tokens that the client has: with the same seed the new session chooses as the old one would have.
            output_token_ids=tuple(self._output),
            # They come with a session's first verdict, and the client has them.
            prompt_logprobs=self._opening.prompt_logprobs and not self._has_spoken,
        )
        remaining_s = max(self._deadline_s - time.monotonic(), 0.001)
        self._has_read = False
        async with replica.waiting():
            self._stream = await self._connection.enter_async_context(replica.client.open(opening, remaining_s))
        return self._stream

    @property
    def _num_deaths(self) -> int:
        """Verifiers that died with this session in a row, less verifiers that were alive since: they only did
        not answer for a while, as on a machine with too much to do."""
        return sum(not death.is_refuted for death in self._deaths)

    @property
    def _is_suspected(self) -> bool:
        """Whether this session is likely enough what its verifier died of. One that had begun is so after two deaths
        in a row: most begin again elsewhere at the same time, and the others did nothing."""
        return self._num_deaths > int(self._has_spoken)

    async def _blame(self, outage: _Outage, error: EasyspecError) -> None:
        """Note a verifier's death; raises UnavailableError if this session, tried alone, has ended one again."""
        if self._stream is None or not isinstance(error, ConnectionLostError | EngineLostError):
            return
        assert self._replica is not None, "a stream is at a replica"
        death = _Death(self._replica.peer, self._instance_id, time.monotonic())
        would_suspect = self._num_deaths >= int(self._has_spoken)
        if would_suspect and isinstance(error, ConnectionLostError):
            await death.peer.probe()  # its answer may refute the death
        self._deaths.append(death)
        if death.is_refuted:  # then the network was it
            return
        if self._is_on_trial and self._is_suspected:
            _log.error("verify_session_condemned", request_id=self._opening.request_id, num_deaths=self._num_deaths)
            message = f"{self._num_deaths} verifiers in a row were lost with this request: it is not tried again"
            condemned = UnavailableError(message)
            condemned.retry_after_s = None
            raise condemned from error
        if self._is_suspected:
            outage.give_up_s = min(outage.give_up_s, time.monotonic() + _SUSPECT_PATIENCE_S)

    def _end_trial(self) -> None:
        if self._is_on_trial:
            self._is_on_trial = False
            self._trials.release()

    async def _lose(self, outage: _Outage, error: EasyspecError) -> None:
        replica = self._replica
        await self.close()
        outage.num_failures += 1
        if replica is None:  # no replica could be picked
            return
        outage.tried.add(replica)
        if isinstance(error, UnavailableError) and not isinstance(error, WrongModelError):
            replica.peer.suspect()
        # Not the message, which may show a token id.
        _log.warning(
            "verify_session_lost",
            request_id=self._opening.request_id,
            replica=replica.address,
            reason=type(error).__name__,
            num_output_tokens=len(self._output),
        )

    async def _wait_for_next_try(self, outage: _Outage, error: EasyspecError) -> None:
        """Return when it is time for the next try; raise `error` if there is no sense in one."""
        has_other = self._replicas.has_other(self._opening.model_fingerprint, outage.tried)
        if not self._may_help(outage, error, has_other):
            raise self._explained(error)
        if has_other:
            return
        # A name stands for several processes and a wrong one has just had its turn.
        pause_s = self._limits.backoff(1 if isinstance(error, WrongModelError) else outage.num_failures)
        if isinstance(error, CapacityError):
            pause_s = max(pause_s, error.retry_after_s)
        if time.monotonic() + pause_s > outage.give_up_s:
            raise self._explained(error)
        await asyncio.sleep(pause_s)
        outage.tried.clear()  # after a pause each may have come back

    def _explained(self, error: EasyspecError) -> EasyspecError:
        """The error, or, where verifiers are there that must not continue the stream, that they are."""
        misfit = self._replicas.misfit(self._opening.model_fingerprint)
        if misfit is None or not isinstance(error, UnavailableError):
            return error
        _log.warning("verify_session_misfit", request_id=self._opening.request_id, reason=misfit)
        return UnavailableError(misfit)

    def _may_help(self, outage: _Outage, error: EasyspecError, has_other: bool) -> bool:
        """Whether to open again may end otherwise than with the same error."""
        if time.monotonic() > outage.give_up_s:
            return False
        if isinstance(error, UnavailableError):
            return True
        if isinstance(error, CapacityError):
            # Who has said nothing yet is better told to come again than kept waiting.
            return has_other or self._has_spoken
        # A fault of the step or of the session's state: it may have been another session's doing, but not twice.
        return outage.num_failures == 1 and (type(error) is EasyspecError or isinstance(error, StalePositionError))


@dataclass(frozen=True)
class _Death:
    """A verifier's process that seems to have ended with a stream, and when, by the monotonic clock."""

    peer: Peer
    instance_id: str
    at_s: float

    @property
    def is_refuted(self) -> bool:
        """Whether the same process has answered since. What it said before tells nothing."""
        info = self.peer.info if self.peer.is_ready and self.peer.asked_s >= self.at_s else None
        return bool(self.instance_id) and info is not None and info.instance_id == self.instance_id


@dataclass
class _Outage:
    """One round's failures: since when, until when to go on trying, how many, and at which replicas of late."""

    started_s: float
    give_up_s: float
    num_failures: int = 0
    tried: set[Replica[VerifyConnection]] = field(default_factory=set)
