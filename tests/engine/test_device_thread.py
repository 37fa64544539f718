from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass

import pytest

from easyspec.engine.device_thread import DeviceThread, Task
from easyspec.errors import CapacityError, EngineLostError, UnavailableError
from easyspec.parallel.launch import EXIT_HUNG
from tests.fakes.servers import eventually


@dataclass(eq=False)
class Number(Task[int]):
    """To be doubled; negative ones are refused, and the others break whatever takes them."""

    value: int


REFUSED, BREAKS_ACCEPT, BREAKS_STEP = -1, -2, -3


class DoublingCore:
    """Doubles numbers, everything that waits in one step. While `gate` is closed a step does not end."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.is_stepping = threading.Event()
        self.thread_names: set[str] = set()
        self._waiting: list[Number] = []

    def accept(self, task: Number) -> None:
        if task.value == REFUSED:
            task.fail(CapacityError("full"))
        elif task.value == BREAKS_ACCEPT:
            raise ValueError("not a number")
        else:
            self._waiting.append(task)

    def step(self) -> bool:
        self.thread_names.add(threading.current_thread().name)
        batch, self._waiting = self._waiting[:3], self._waiting[3:]
        self.is_stepping.set()
        self.gate.wait()
        if any(task.value == BREAKS_STEP for task in batch):
            self._waiting = batch + self._waiting
            raise RuntimeError("device lost")
        if batch:
            self.batches.append([task.value for task in batch])
        for task in batch:
            task.finish(2 * task.value)
        return bool(self._waiting)

    def abandon(self, error: BaseException) -> None:
        for task in self._waiting:
            task.fail(error)
        self._waiting = []


@pytest.fixture
def core() -> DoublingCore:
    return DoublingCore()


@pytest.fixture
async def thread(core: DoublingCore) -> AsyncIterator[DeviceThread]:
    thread = DeviceThread("test-device")
    await thread.start(lambda: core)
    yield thread
    core.gate.set()
    await thread.stop()


async def test_tasks_run_on_the_named_thread(thread: DeviceThread, core: DoublingCore) -> None:
    assert await thread.submit(Number(21)) == 42
    assert core.thread_names == {"test-device"}


async def test_what_arrives_during_a_step_is_one_batch_in_order(thread: DeviceThread, core: DoublingCore) -> None:
    core.gate.clear()
    first = thread.submit(Number(1))
    await asyncio.to_thread(core.is_stepping.wait)
    rest = [thread.submit(Number(value)) for value in (2, 3, 4, 5)]
    core.gate.set()
    assert await asyncio.gather(first, *rest) == [2, 4, 6, 8, 10]
    assert core.batches == [[1], [2, 3, 4], [5]]  # the core takes three at a time, and is stepped until it is idle


async def test_an_error_belongs_to_its_task(thread: DeviceThread) -> None:
    good, bad = thread.submit(Number(1)), thread.submit(Number(REFUSED))
    with pytest.raises(CapacityError, match="full"):
        await bad
    assert await good == 2


async def test_a_step_that_breaks_fails_who_waits_and_the_thread_lives_on(
    thread: DeviceThread, core: DoublingCore
) -> None:
    core.gate.clear()
    before = thread.submit(Number(1))
    await asyncio.to_thread(core.is_stepping.wait)
    bad, beside = thread.submit(Number(BREAKS_STEP)), thread.submit(Number(2))
    core.gate.set()
    assert await before == 2
    for future in (bad, beside):
        with pytest.raises(RuntimeError, match="device lost"):
            await future
    assert await thread.submit(Number(3)) == 6


async def test_a_task_that_cannot_even_be_accepted_fails_alone(thread: DeviceThread) -> None:
    bad, good = thread.submit(Number(BREAKS_ACCEPT)), thread.submit(Number(1))
    with pytest.raises(ValueError, match="not a number"):
        await asyncio.wait_for(bad, 5)
    assert await asyncio.wait_for(good, 5) == 2


async def test_an_answer_to_somebody_who_has_gone_disturbs_nobody(thread: DeviceThread, core: DoublingCore) -> None:
    core.gate.clear()
    gone, stays = thread.submit(Number(1)), thread.submit(Number(2))
    gone.cancel()
    core.gate.set()
    assert await stays == 4
    refused = thread.submit(Number(REFUSED))
    refused.cancel()
    assert await thread.submit(Number(3)) == 6


async def test_posting_needs_no_event_loop(thread: DeviceThread) -> None:
    task = Number(4)
    await asyncio.to_thread(thread.post, task)
    assert await asyncio.wrap_future(task.future) == 8


async def test_stopping_fails_what_still_waits_and_what_comes_later(core: DoublingCore) -> None:
    thread = DeviceThread("test-device")
    await thread.start(lambda: core)
    core.gate.clear()
    core.is_stepping.clear()
    running = thread.submit(Number(1))
    await asyncio.to_thread(core.is_stepping.wait)
    waiting = [thread.submit(Number(value)) for value in range(8)]
    stopping = asyncio.create_task(thread.stop())
    await asyncio.sleep(0)
    core.gate.set()
    await stopping
    assert await running == 2
    for future in [*waiting, thread.submit(Number(9))]:
        with pytest.raises(UnavailableError, match="stopped"):
            await asyncio.wait_for(future, 5)
    await thread.stop()


async def test_what_building_raises_comes_out_of_start() -> None:
    def build() -> DoublingCore:
        raise CapacityError("no device")

    thread = DeviceThread("test-device")
    with pytest.raises(CapacityError, match="no device"):
        await thread.start(build)
    await thread.stop()


async def test_a_start_that_is_given_up_ends_quietly(core: DoublingCore, died: list[object]) -> None:
    """A process that is stopped while it loads must not end in a traceback."""
    begun, gate, thread = threading.Event(), threading.Event(), DeviceThread("test-device")

    def build() -> DoublingCore:
        begun.set()
        gate.wait()
        return core

    starting = asyncio.create_task(thread.start(build))
    await asyncio.to_thread(begun.wait)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    stopping = asyncio.create_task(thread.stop())
    await asyncio.sleep(0)
    gate.set()
    await stopping
    assert died == []
    assert core.batches == []


@pytest.fixture
def died(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Threads that ended in an exception."""
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    return seen


async def test_stopping_before_starting_is_harmless() -> None:
    await DeviceThread("test-device").stop()


def resolved(act: Callable[[Number], None]) -> Future[int]:
    task = Number(1)
    act(task)
    return task.future


def test_a_task_resolves_to_a_result_or_an_error() -> None:
    assert resolved(lambda task: task.finish(7)).result(0) == 7
    error = ValueError("no")
    assert resolved(lambda task: task.fail(error)).exception(0) is error


async def test_an_idle_thread_waits_without_stepping(thread: DeviceThread, core: DoublingCore) -> None:
    assert await thread.submit(Number(1)) == 2
    await eventually(lambda: core.batches == [[1]])
    core.is_stepping.clear()
    await asyncio.sleep(0.02)
    assert not core.is_stepping.is_set()


async def test_an_opening_nobody_waits_for_any_more_is_withdrawn(thread: DeviceThread, core: DoublingCore) -> None:
    closed: list[int] = []
    core.gate.clear()
    in_step = asyncio.ensure_future(thread.submit(Number(1)))
    await asyncio.to_thread(core.is_stepping.wait, 5)
    number = Number(21)
    opening = asyncio.ensure_future(thread.submit_opening(number, closed.append))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert number.future.cancelled()
    core.gate.set()
    assert await in_step == 2
    assert closed == []


async def test_an_opening_that_is_answered_while_its_caller_goes_away_is_closed(thread: DeviceThread) -> None:
    """The answer has left the device thread and not yet reached the event loop."""
    closed: list[int] = []
    number = Number(21)
    opening = asyncio.ensure_future(thread.submit_opening(number, closed.append))
    await asyncio.sleep(0)
    assert number.future.result(5) == 42  # blocks the loop, so that it cannot have seen it
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert closed == [42]


def lose_another_rank() -> None:
    raise EngineLostError("another rank is gone")


async def test_a_loss_in_an_idle_time_is_one(thread: DeviceThread) -> None:
    thread.when_idle = lose_another_rank
    await asyncio.wait_for(thread.wait_lost(), 10)
    with pytest.raises(UnavailableError):
        await thread.submit(Number(1))


async def test_a_loss_at_the_very_end_is_one(thread: DeviceThread) -> None:
    """torchrun asks the others to stop when a rank is gone: whoever then says goodbye finds nobody."""
    thread.when_stopped = lose_another_rank
    await thread.stop()
    await asyncio.wait_for(thread.wait_lost(), 10)


async def test_a_step_that_hangs_is_lost_and_ends_the_process(core: DoublingCore) -> None:
    exit_codes: list[int] = []
    thread = DeviceThread("test-device", least_step_bound_s=1.0, end_process=exit_codes.append)
    await thread.start(lambda: core)
    assert await thread.submit(Number(1)) == 2
    core.gate.clear()
    hanging = thread.submit(Number(2))
    await asyncio.wait_for(thread.wait_lost(), 10)
    await asyncio.wait_for(thread.stop(), 1)  # does not wait for the step
    with pytest.raises(UnavailableError):
        await thread.submit(Number(3))
    await eventually(lambda: exit_codes == [EXIT_HUNG], 10)
    core.gate.set()
    with contextlib.suppress(UnavailableError):
        await hanging


async def test_steps_that_are_slow_and_end_are_no_reason(core: DoublingCore) -> None:
    exit_codes: list[int] = []
    thread = DeviceThread("test-device", least_step_bound_s=2.0, end_process=exit_codes.append)
    await thread.start(lambda: core)
    for _ in range(3):
        core.gate.clear()
        slow = thread.submit(Number(2))
        await asyncio.sleep(1.2)
        core.gate.set()
        assert await slow == 4
    await thread.stop()
    assert exit_codes == []


class StickyError(RuntimeError):
    """As CUDA's errors come out of torch."""


@pytest.mark.parametrize(
    ("message", "is_group", "told"),
    [
        ("CUDA error: an illegal memory access was encountered", False, EngineLostError),
        ("CUDA error: uncorrectable ECC error encountered", False, EngineLostError),
        ("cuBLAS: CUBLAS_STATUS_EXECUTION_FAILED when calling", False, EngineLostError),
        ("CUDA error: out of memory", False, CapacityError),
        ("CUDA out of memory. Tried to allocate 2 GiB", False, CapacityError),
        ("index out of range", False, StickyError),
        ("index out of range", True, EngineLostError),
    ],
)
async def test_an_error_that_stays_ends_the_engine(
    core: DoublingCore, monkeypatch: pytest.MonkeyPatch, message: str, is_group: bool, told: type[Exception]
) -> None:
    def step() -> bool:
        if core._waiting:
            raise StickyError(message)
        return False

    monkeypatch.setattr(core, "step", step)
    thread = DeviceThread("test-device", is_group=is_group)
    await thread.start(lambda: core)
    with pytest.raises(told):
        await thread.submit(Number(1))
    if told is EngineLostError:
        await asyncio.wait_for(thread.wait_lost(), 5)
    else:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(thread.wait_lost(), 0.2)
    await thread.stop()
