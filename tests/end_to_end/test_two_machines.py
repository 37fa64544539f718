"""Both roles over two machines: see `two_machines`, the script that makes them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.two_machines import REPOSITORY, REQUESTS, why_not
from tests.fakes.processes import assert_none_left_with

GROUP_GONE_S = 10.0


def report(base: Path, draft: Path, logs: Path, *flags: str) -> Any:
    command = [sys.executable, "-m", "tests.end_to_end.two_machines", "--base", str(base), "--draft", str(draft)]
    done = subprocess.run(
        [*command, "--logs", str(logs), *flags], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"network namespaces cannot be made here: {reason}")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_machines_say_what_one_rank_says_also_when_disturbed(
    base_folder: Path, draft_folder: Path, logs: Path
) -> None:
    """No process ends when a cable is pulled out and no connection breaks: only the lifeline's keepalives tell."""
    said = report(base_folder, draft_folder, logs, "--disturb")
    print(said)
    assert said["same"] == said["requests"] == len(REQUESTS)
    assert said["groups_gone_s"] < GROUP_GONE_S
    assert said["is_same_text"]
    assert_none_left_with(str(base_folder))
