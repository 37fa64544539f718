"""Who gets the next place: turns by client, a bounded queue, honest refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from easyspec.errors import CapacityError
from gateway.doorway.admission import Admission


@dataclass
class Hall:
    """Requests in front of an Admission; each holds its place until it is told to leave."""

    admission: Admission
    order: list[str] = field(default_factory=list)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    leaving: dict[str, asyncio.Event] = field(default_factory=dict)

    async def come(self, name: str, timeout_s: float | None = None, num_places: int = 1, request_id: str = "") -> None:
        """`name` is a client's name and a number."""
        self.leaving[name] = asyncio.Event()

        async def request() -> None:
            async with self.admission.place(name.rstrip("0123456789"), timeout_s, num_places, request_id):
                self.order.append(name)
                await self.leaving[name].wait()

        self.tasks[name] = asyncio.create_task(request())
        await settle()

    async def leave(self, name: str) -> None:
        self.leaving[name].set()
        await self.tasks[name]
        await settle()

    async def refusal(self, name: str) -> CapacityError:
        with pytest.raises(CapacityError) as caught:
            await self.tasks[name]
        return caught.value


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@asynccontextmanager
async def hall(max_running: int, max_waiting: int, wait_timeout_s: float = 30.0) -> AsyncIterator[Hall]:
    hall = Hall(Admission(max_running, max_waiting, wait_timeout_s))
    yield hall
    for task in hall.tasks.values():
        task.cancel()
    await asyncio.gather(*hall.tasks.values(), return_exceptions=True)
    assert (hall.admission.num_running, hall.admission.num_waiting) == (0, 0)


async def test_clients_take_turns_however_many_requests_one_has_sent() -> None:
    async with hall(1, 100) as here:
        await here.come("flood0")
        for number in range(1, 20):
            await here.come(f"flood{number}")
        await here.come("ann1")
        await here.come("bob1")
        await here.come("ann2")
        for _ in range(7):
            await here.leave(here.order[-1])
        assert here.order == ["flood0", "flood1", "ann1", "bob1", "flood2", "ann2", "flood3", "flood4"]


async def test_requests_of_one_client_are_first_come_first_served() -> None:
    async with hall(2, 100) as here:
        for number in range(6):
            await here.come(f"a{number}")
        for number in range(4):
            await here.leave(f"a{number}")
        assert here.order == [f"a{number}" for number in range(6)]


async def test_a_full_queue_has_room_for_a_client_with_fewer_waiting() -> None:
    async with hall(1, 4) as here:
        for number in range(5):
            await here.come(f"flood{number}")
        await here.come("flood5")
        assert "5" not in str(await here.refusal("flood5")).split()[0]  # its own client is the busiest: refused
        await here.come("ann1")
        assert "too many requests of this one" in str(await here.refusal("flood4"))
        await here.come("ann2")  # 3 of the flood, 1 of ann: the flood makes room once more
        await here.refusal("flood3")
        await here.come("ann3")  # 2 and 2: no request has to make room
        await here.refusal("ann3")
        await here.leave("flood0")
        await here.leave("flood1")
        assert here.order == ["flood0", "flood1", "ann1"]


async def test_a_refusal_says_when_a_place_should_be_free() -> None:
    now_s = 100.0
    admission = Admission(2, 3, 30.0, clock=lambda: now_s)
    assert admission.retry_after_s() == 30.0  # nothing is known yet but the patience
    here = Hall(admission)
    for number in range(5):
        await here.come(f"a{number}")
    for number in range(3):  # every 2 s a place comes free
        now_s += 2.0
        await here.leave(f"a{number}")
        await here.come(f"a{number + 5}")
    await here.come("a9")
    refused = await here.refusal("a9")
    assert refused.retry_after_s == pytest.approx(2.0 * 4)
    assert admission.num_refused == 1
    for task in here.tasks.values():
        task.cancel()


async def test_waiting_ends_before_the_requests_own_deadline() -> None:
    async with hall(1, 4, wait_timeout_s=30.0) as here:
        await here.come("a1")
        await here.come("a2", timeout_s=0.1)
        async with asyncio.timeout(5.0):
            assert "0.08 s" in str(await here.refusal("a2"))


async def test_requests_that_go_away_while_waiting_leave_nothing_behind() -> None:
    async with hall(1, 4) as here:
        await here.come("a1")
        for number in range(2, 6):
            await here.come(f"a{number}")
        here.tasks["a2"].cancel()
        here.tasks["a4"].cancel()
        await settle()
        assert here.admission.num_waiting == 2
        await here.leave("a1")
        await here.leave("a3")
        assert here.order == ["a1", "a3", "a5"]


async def test_a_place_granted_to_a_request_that_has_just_gone_goes_to_the_next() -> None:
    async with hall(1, 4) as here:
        await here.come("a1")
        await here.come("a2")
        await here.come("b1")
        here.leaving["a1"].set()
        await asyncio.sleep(0)  # the place of a1 is a2's now, which does not know yet
        here.tasks["a2"].cancel()
        await settle()
        assert here.order == ["a1", "b1"]


async def test_places_are_counted_by_choices() -> None:
    async with hall(4, 10) as it:
        await it.come("a1", num_places=3)
        await it.come("b1", num_places=2)
        await it.come("c1")  # would fit, and does not overtake
        assert it.order == ["a1"]
        await it.leave("a1")
        assert it.order == ["a1", "b1", "c1"]
        await it.come("d1", num_places=99)  # all there are
        await it.leave("b1")
        assert it.order[-1] == "c1"
        await it.leave("c1")
        assert it.order[-1] == "d1"
        await it.come("e1")
        assert it.order[-1] == "d1"
        await it.leave("d1")
        assert it.order[-1] == "e1"


async def test_one_that_gives_up_lets_those_behind_it_in() -> None:
    async with hall(2, 10) as it:
        await it.come("a1")
        await it.come("b1", num_places=2)
        await it.come("c1")
        it.tasks["b1"].cancel()
        await settle()
        assert it.order == ["a1", "c1"]


async def test_requests_of_one_client_take_turns_however_many_prompts_they_have() -> None:
    async with hall(1, 20) as it:
        for number in range(1, 5):
            await it.come(f"a{number}", request_id="many")
        await it.come("a5", request_id="one")
        for name in ("a1", "a2", "a5", "a3", "a4"):
            await it.leave(name)
        assert it.order == ["a1", "a2", "a5", "a3", "a4"]
