"""However a test of ranks ends, its processes end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parallel.rank_runner import run_ranks

REPOSITORY = Path(__file__).parents[2]
HANGING = """
from tests.parallel.rank_runner import run_ranks
from tests.parallel.test_rank_runner import hang
if __name__ == "__main__":
    run_ranks(2, hang)
"""


def hang() -> None:
    os.write(1, f"{os.environ['RANK']}\n".encode())  # whole, as the ranks share a pipe
    time.sleep(600)


def hang_unless_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank 1 does not want to")
    time.sleep(600)


def die_as_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_an_error_of_one_rank_ends_all() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 raised\n(.*\n)*ValueError: rank 1 does not want to"):
        run_ranks(2, hang_unless_rank_1)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_the_death_of_one_rank_ends_all() -> None:
    with pytest.raises(RuntimeError, match="rank 1 died"):
        run_ranks(2, die_as_rank_1)
    assert multiprocessing.active_children() == []


def test_the_death_of_the_runner_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as runner:
        assert runner.stdout is not None
        assert sorted(runner.stdout.readline() for _ in range(2)) == ["0\n", "1\n"]
        runner.kill()
        runner.communicate(timeout=30)  # returns when no process is left that could write
