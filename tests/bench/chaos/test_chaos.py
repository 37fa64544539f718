"""The harness that injects faults: what it counts as wrong, what its proxy does, and a short run of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.chaos.answers import Answer, Verdict
from bench.chaos.chaos import BENCHMARK, MAX_STALL_S, Report
from bench.chaos.clients import Held, kinds
from bench.chaos.limits import footprint, full_disk, full_memory
from bench.chaos.proxy import FaultyProxy
from easyspec.errors import CapacityError, EasyspecError, UnavailableError

WHOLE = {0: [1, 2, 3], 1: [4, 5]}
ENDS = {0: ("length", "", 3), 1: ("length", "", 2)}


def answer(token_ids: dict[int, list[int]], endings: dict[int, tuple[Any, ...]]) -> Answer:
    made = Answer()
    made.token_ids.update(token_ids)
    made.endings.update(endings)
    return made


@pytest.mark.parametrize(
    ("token_ids", "endings", "expected"),
    [
        (WHOLE, ENDS, Verdict.RIGHT),
        ({0: [1, 2], 1: [4, 5]}, {1: ENDS[1]}, Verdict.CUT),
        ({}, {}, Verdict.CUT),
        (WHOLE, {0: ENDS[0]}, Verdict.CUT),
        ({0: [1, 2], 1: [4, 5]}, {0: ("length", "", 2), 1: ENDS[1]}, Verdict.LOST),
        ({0: [1, 2, 3, 3], 1: [4, 5]}, ENDS, Verdict.DOUBLED),
        ({0: [1, 2, 2], 1: [4, 5]}, ENDS, Verdict.WRONG),
        ({0: [1, 2, 3], 1: [5]}, {}, Verdict.WRONG),
        (WHOLE, {0: ENDS[0], 1: ("stop", "", 2)}, Verdict.LOST),
    ],
)
def test_answers_are_compared_choice_by_choice(
    token_ids: dict[int, list[int]], endings: dict[int, tuple[Any, ...]], expected: Verdict
) -> None:
    assert answer(token_ids, endings).compared_with(answer(WHOLE, ENDS)) is expected


@pytest.mark.parametrize(
    ("error", "verdict", "num_failures"),
    [
        (None, Verdict.RIGHT, 0),
        (UnavailableError("lost"), Verdict.CUT, 0),
        (CapacityError("full"), Verdict.CUT, 0),
        (EasyspecError("a bug"), Verdict.CUT, 1),
        (None, Verdict.CUT, 1),  # ended without a word
        (None, Verdict.WRONG, 1),
    ],
)
def test_what_makes_a_run_fail(error: EasyspecError | None, verdict: Verdict, num_failures: int) -> None:
    report = Report(seed=1)
    report.add(kinds(8)[0], Answer(error=error, says_when=True, longest_pause_s=1.0), verdict, "r1")
    assert len(report.failures) == num_failures
    report.leftovers = {"verifier 0": Held(0, 0), "verifier 1": Held(0, 2), "drafter 2": None}
    report.longest_stall_s = MAX_STALL_S + 1
    assert len(report.failures) == num_failures + 3


def test_an_error_that_does_not_say_when_to_come_again_makes_a_run_fail() -> None:
    report = Report(seed=1)
    report.add(kinds(8)[0], Answer(error=CapacityError("full")), Verdict.CUT, "r1")
    assert len(report.failures) == 1


async def test_the_proxy_passes_on_stalls_and_cuts() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server, FaultyProxy(f"{host}:{port}") as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.address.rpartition(":")[2]))
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        started_s = time.monotonic()
        stalling = asyncio.create_task(proxy.stall(0.3))
        await asyncio.sleep(0)
        writer.write(b"b")
        assert await reader.read(1) == b"b"
        assert time.monotonic() - started_s > 0.25
        await stalling
        delaying = asyncio.create_task(proxy.delay(0.5, 0.2))
        await asyncio.sleep(0)
        started_s = time.monotonic()
        writer.write(b"c")
        assert await reader.read(1) == b"c"
        assert time.monotonic() - started_s > 0.35  # there and back
        await delaying
        proxy.cut()
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(1), 5) == b""
        assert reader.at_eof() or reader.exception() is not None
        writer.close()


def test_limits_are_felt_and_taken_back(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for line in sys.stdin:\n"
        "    try:\n"
        "        exec(line)\n"
        "        print('done', flush=True)\n"
        "    except (MemoryError, OSError) as error: print(type(error).__name__, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def did(line: str) -> str:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        write = f"import os; os.write(os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY), b'x')"
        # An interpreter that still starts would meet the limits too, and end.
        assert did("pass") == "done"
        before = footprint(process.pid)
        assert before is not None
        with full_memory(process.pid, 8 << 20), full_disk(process.pid):
            assert did("bytearray(100 << 20)") == "MemoryError"
            assert did("bytearray(1 << 20)") == "done"
            assert did(write) == "OSError"
        assert did("kept = bytearray(b'x' * (100 << 20))") == "done"
        assert did(write) == "done"
        after = footprint(process.pid)
        assert after is not None
        assert after.memory_mib - before.memory_mib > 90
        process.stdin.close()  # type: ignore[union-attr]
    assert footprint(process.pid) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_run_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        BENCHMARK.main(["--faults", "20", "--seconds", "120", "--clients", "4", "--tokens", "60", "--seed", "3"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["num_faults"] > 0
    assert report["answers"]["right"] > 0
