"""A rank that goes without a goodbye is missed, whatever the others are busy with."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection

import pytest

from easyspec.errors import ConfigurationError
from easyspec.parallel import lifeline
from easyspec.parallel.launch import EXIT_LOST
from easyspec.parallel.lifeline import Lifeline, open_lifeline

QUIET_S = 0.2
LOST_WITHIN_S = 10.0


def connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        return here, listener.accept()[0]


def pair(on_lost: Callable[[str], None]) -> tuple[Lifeline, socket.socket]:
    here, there = connection()
    return Lifeline([here], on_lost), there


def test_a_peer_that_ends_is_lost() -> None:
    losses: queue.Queue[str] = queue.Queue()
    _, there = pair(losses.put)
    with pytest.raises(queue.Empty):
        losses.get(timeout=QUIET_S)
    there.close()
    assert losses.get(timeout=LOST_WITHIN_S) == "its process ended"


def test_a_peer_that_leaves_is_not() -> None:
    losses: queue.Queue[str] = queue.Queue()
    here, there = connection()
    Lifeline([here], losses.put)
    other = Lifeline([there], losses.put)
    other.leave()
    with pytest.raises(queue.Empty):
        losses.get(timeout=QUIET_S)


def test_nobody_is_missed_after_leaving() -> None:
    losses: queue.Queue[str] = queue.Queue()
    line, there = pair(losses.put)
    line.leave()
    line.leave()
    there.close()
    with pytest.raises(queue.Empty):
        losses.get(timeout=QUIET_S)


def test_whoever_loses_a_rank_lets_the_others_know() -> None:
    """Ranks 1 and 2 are tied to rank 0 alone: it ends its ties when one of them is gone."""
    losses: queue.Queue[str] = queue.Queue()
    (first, rank_1), (second, rank_2) = connection(), connection()
    Lifeline([first, second], losses.put)
    rank_1.close()
    rank_2.settimeout(LOST_WITHIN_S)
    assert rank_2.recv(1) == b""
    rank_2.close()
    assert losses.get(timeout=LOST_WITHIN_S) == "its process ended"


class Board:
    """Gives rank 0's bytes to the others, threads of this process."""

    def __init__(self) -> None:
        self._posted = threading.Event()
        self.payload = b""

    def share(self, payload: bytes | None) -> bytes:
        if payload is not None:
            self.payload = payload
            self._posted.set()
        assert self._posted.wait(LOST_WITHIN_S)
        return self.payload


@pytest.fixture
def three_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")


@pytest.mark.usefixtures("three_ranks")
def test_strangers_are_turned_away() -> None:
    board = Board()
    losses: queue.Queue[str] = queue.Queue()
    with ThreadPoolExecutor() as pool:
        leader = pool.submit(open_lifeline, 0, 3, board.share, losses.put)
        host, port, _ = json.loads(board.share(None))
        assert host == "127.0.0.1"
        for greeting in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
            # It may be turned away before it has said everything.
            with socket.create_connection((host, port)) as stranger, suppress(OSError):
                stranger.sendall(greeting)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""
        assert not leader.done()
        followers = [pool.submit(open_lifeline, rank, 3, board.share, losses.put) for rank in (1, 2)]
        lines = [future.result() for future in (leader, *followers)]
    for line in lines:
        line.leave()
    with pytest.raises(queue.Empty):
        losses.get(timeout=QUIET_S)


@pytest.mark.usefixtures("three_ranks")
def test_a_rank_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "_MEETING_TIMEOUT_S", 0.1)
    board = Board()
    with pytest.raises(ConfigurationError, match="2 of 2 ranks did not reach rank 0: timed out"):
        open_lifeline(0, 3, board.share)
    with pytest.raises(ConfigurationError, match=r"rank 1 cannot reach rank 0 at 127\.0\.0\.1:\d+: .*every TCP port"):
        open_lifeline(1, 3, board.share)


def hang(rank: int, pipe: Connection) -> None:
    """A rank that is deaf to everything, as in a collective that never ends."""
    os.environ["WORLD_SIZE"] = "3"

    def share(payload: bytes | None) -> bytes:
        if payload is not None:
            pipe.send(payload)
        return payload or pipe.recv()

    open_lifeline(rank, 3, share)
    pipe.send("tied")
    time.sleep(600)


@contextmanager
def three_that_hang() -> Iterator[list[multiprocessing.process.BaseProcess]]:
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(3)]
    processes = [context.Process(target=hang, args=(rank, there)) for rank, (_, there) in enumerate(pipes)]
    try:
        for process in processes:
            process.start()
        meeting = pipes[0][0].recv()
        for here, _ in pipes[1:]:
            here.send(meeting)
        assert [here.recv() for here, _ in pipes] == ["tied"] * 3
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_though_they_hang(victim: int) -> None:
    with three_that_hang() as processes:
        pid = processes[victim].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        started_s = time.monotonic()
        for process in processes:
            process.join(2 * LOST_WITHIN_S)
        assert time.monotonic() - started_s < LOST_WITHIN_S
        exit_codes = [process.exitcode for process in processes]
        assert exit_codes.pop(victim) == -signal.SIGKILL
        assert exit_codes == [EXIT_LOST] * 2
