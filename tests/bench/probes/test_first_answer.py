"""The time to the first answer is that of a real command with services of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.probes.first_answer import FirstAnswerSettings, ask
from easyspec.cli.processes import DEFAULT_BASE
from easyspec.errors import UnavailableError


def test_an_answer_is_timed_from_the_start_of_the_command_to_its_end() -> None:
    answer = ask(FirstAnswerSettings(DEFAULT_BASE, "def add(a, b):", max_tokens=8), run=1)
    assert 0.5 < answer["first_text_s"] <= answer["answer_s"] <= answer["ended_s"]
    assert answer["answer"]


def test_a_command_that_fails_has_no_time(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"config\.json"):
        ask(FirstAnswerSettings(tmp_path), run=1)
