"""Layer groups timed on drafts of a few weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.probes.layer_groups import BENCHMARK
from easyspec.ops.native_library import library_problem

pytestmark = pytest.mark.skipif(bool(library_problem()), reason="the library was not built")


def test_every_draft_is_timed_by_every_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "groups.json"
    flags = ["--widths", "64", "128", "--layers", "4", "--threads", "1", "--json", str(path)]
    assert BENCHMARK.main(flags) == 0
    times = json.loads(path.read_text())["times"]
    assert [(each["width"], each["num_layers"], each["num_threads"]) for each in times] == [(64, 4, 1), (128, 4, 1)]
    for each in times:
        assert set(each["speed_ups"]) == {"sequential 2", "sequential 4", "staged 2", "staged 4"}
        assert all(0 < speed_up < 10 for speed_up in each["speed_ups"].values())
    assert "staged 4" in capsys.readouterr().out
