"""How many choices are decoded at a time; requests wait a little, in turn by client, or are told when to come again."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from easyspec.errors import CapacityError

_RATE = 0.1
# A request waits for no more than this share of the time it has: its refusal should reach the client in time.
_WAIT_SHARE = 0.8
_MIN_RETRY_S, _MAX_RETRY_S = 0.1, 600.0


@dataclass(eq=False)
class _Waiter:
    """A prompt that waits; `granted` is resolved when its places are its own, or fails when it has to go.

    `turn` says how many prompts of the same request were waiting before it.
    """

    client: str
    request_id: str
    num_places: int
    turn: int
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Admission:
    """At most `max_running` choices are decoded; at most `max_waiting` prompts wait, each for `wait_timeout_s` seconds.

    Clients take turns: a place that comes free goes to the client whose turn is next, however many requests another
    one has sent, and a client's requests take turns, however many prompts one of them has. When the queue is full, a
    prompt of a client that has fewer waiting than the busiest one takes the place of the latter's newest. A refusal
    says after how long a request that comes then should be served, by the rate at which places have come free.
    """

    def __init__(
        self, max_running: int, max_waiting: int, wait_timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._wait_timeout_s = wait_timeout_s
        self._clock = clock
        # By client, in the order of their turns; no client without waiting requests.
        self._queues: collections.OrderedDict[str, collections.deque[_Waiter]] = collections.OrderedDict()
        self._freed_s: float | None = None
        self._service_interval_s: float | None = None
        self._num_taken = 0
        self.num_running = 0
        self.num_waiting = 0
        self.num_refused = 0

    @contextlib.asynccontextmanager
    async def place(
        self, client: str = "", timeout_s: float | None = None, num_places: int = 1, request_id: str = ""
    ) -> AsyncIterator[None]:
        """Hold `num_places`, or all if there are fewer; CapacityError if they do not come free in time.

        `timeout_s` is all the time that the request has, `request_id` the same for prompts that came together.
        """
        num_places = min(num_places, self._max_running)
        if self._has_room(num_places) and not self.num_waiting:
            self._take(num_places)
        else:
            await self._wait(client, timeout_s, num_places, request_id)
        try:
            yield
        finally:
            self._release(num_places)

    def _has_room(self, num_places: int) -> bool:
        return self._num_taken + num_places <= self._max_running

    def _take(self, num_places: int) -> None:
        self._num_taken += num_places
        self.num_running += 1

    def retry_after_s(self) -> float:
        """After how long a request that comes then should get a place, if the queue is served as it has been."""
        if self._service_interval_s is None:
            return self._wait_timeout_s
        return min(max(self._service_interval_s * (self.num_waiting + 1), _MIN_RETRY_S), _MAX_RETRY_S)

    async def _wait(self, client: str, timeout_s: float | None, num_places: int, request_id: str) -> None:
        if self.num_waiting >= self._max_waiting:
            self._make_room(client)
        queue = self._queues.setdefault(client, collections.deque())
        turn = sum(other.request_id == request_id for other in queue) if request_id else 0
        waiter = _Waiter(client, request_id, num_places, turn)
        queue.append(waiter)
        self.num_waiting += 1
        patience_s = self._wait_timeout_s if timeout_s is None else min(self._wait_timeout_s, _WAIT_SHARE * timeout_s)
        try:
            async with asyncio.timeout(patience_s):
                await waiter.granted
        except TimeoutError:
            self._forget(waiter)
            raise self._refusal(f"no place came free within {patience_s:.3g} s") from None
        except BaseException:  # cancelled, maybe in the very turn in which the place was granted
            self._forget(waiter)
            raise

    def _make_room(self, client: str) -> None:
        """Send the newest request of the busiest client away; CapacityError if that would be this one."""
        busiest = max(self._queues.values(), key=len, default=None)
        if busiest is None or len(busiest) <= len(self._queues.get(client, ())) + 1:
            raise self._refusal(f"{self.num_running} requests are running and {self.num_waiting} waiting")
        waiter = busiest[-1]
        self._remove(waiter)
        waiter.granted.set_exception(self._refusal("other clients' turn: too many requests of this one are waiting"))

    def _refusal(self, message: str) -> CapacityError:
        self.num_refused += 1
        return CapacityError(message, self.retry_after_s())

    def _forget(self, waiter: _Waiter) -> None:
        """The request does not wait any more; if a place was its own by then, the next one gets it."""
        if not waiter.granted.done() or waiter.granted.cancelled():
            self._remove(waiter)
            self._grant()
        elif waiter.granted.exception() is None:
            self._release(waiter.num_places)

    def _remove(self, waiter: _Waiter) -> None:
        queue = self._queues.get(waiter.client)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            self.num_waiting -= 1
            if not queue:
                del self._queues[waiter.client]

    def _release(self, num_places: int) -> None:
        self._learn_interval()
        self.num_running -= 1
        self._num_taken -= num_places
        self._grant()

    def _grant(self) -> None:
        """Let in what there is room for."""
        while self.num_waiting:
            client, queue = next(iter(self._queues.items()))
            waiter = min(queue, key=lambda waiting: waiting.turn)
            if not self._has_room(waiter.num_places):
                return  # no request overtakes it: small ones would keep a large one waiting for ever
            self._remove(waiter)
            if queue:
                self._queues.move_to_end(client)  # its next turn comes after all others'
            # Taken here and not when the waiter runs: until then another request might take the same place.
            if not waiter.granted.done():
                self._take(waiter.num_places)
                waiter.granted.set_result(None)

    def _learn_interval(self) -> None:
        """How often a place comes free while all are taken."""
        now_s = self._clock()
        if self._num_taken < self._max_running and not self.num_waiting:
            self._freed_s = None
            return
        if self._freed_s is not None:
            interval_s = now_s - self._freed_s
            known_s = self._service_interval_s
            self._service_interval_s = interval_s if known_s is None else known_s + _RATE * (interval_s - known_s)
        self._freed_s = now_s
