"""The planner beside measured ranks: estimates, the generated tables, and (slow) the measurement itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bench.harness.machine import REPOSITORY
from bench.ranks import ranks, section
from bench.ranks.constants import Constants
from bench.ranks.estimates import cost_model, round_rows
from bench.ranks.passes import DRAFT
from easyspec.planner.scheme import draft_schemes

CONSTANTS = Constants(2, 10e9, 50e9, 8.0, 300.0, 1e9, 500.0, {64: 300.0, 524_288: 824.3})
MEASURED = {"calibrate": 20.0, "step": 10.0, "verify": 60.0, "round": 120.0}


def report_of(num_ranks: int = 2) -> dict[str, Any]:
    constants = dataclasses.replace(CONSTANTS, num_ranks=num_ranks)
    schemes = [scheme for scheme in draft_schemes(DRAFT, num_ranks) if scheme.num_ranks == num_ranks]
    rows = [row for scheme in schemes for row in round_rows(constants, scheme, MEASURED)]
    group = {"constants": dataclasses.asdict(constants), "rows": rows}
    machine = {"cpu": "a CPU", "cores": 2, "torch": "2"}
    return {
        "others_cpu_share": 0.01,
        "command": "c",
        "commit": "f00",
        "date": "d",
        "machine": machine,
        "num_rounds": 3,
        "groups": [group],
    }


def test_a_round_is_the_sum_of_its_parts_and_an_operation_costs_what_was_measured() -> None:
    for scheme in draft_schemes(DRAFT, 2):
        if scheme.num_ranks != 2:
            continue
        figures = {row["figure"]: row["model_ms"] for row in round_rows(CONSTANTS, scheme, MEASURED)}
        parts = figures["calibrate"] + 4 * figures["step"] + figures["verify"]
        assert figures["round"] == pytest.approx(parts)
    costs = cost_model(CONSTANTS)
    slower = cost_model(dataclasses.replace(CONSTANTS, op_us=9.0))
    assert slower._part_us(10, 0, 0) - costs._part_us(10, 0, 0) == pytest.approx(10.0)


def test_the_tables_are_written_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "planning.md"
    page.write_text(f"before\n{section._BEGIN}\nold\n{section._END}\nafter\n")
    section.refresh(page, report_of())
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| staged LP N=4 R=2 | 2 |" in text
    section.refresh(page, report_of())
    assert page.read_text() == text
    with pytest.raises(ValueError, match="lacks"):
        section.refresh(_without_marks(tmp_path), report_of())


def _without_marks(folder: Path) -> Path:
    page = folder / "other.md"
    page.write_text("nothing")
    return page


def test_the_page_shows_the_committed_measurement() -> None:
    report = json.loads((REPOSITORY / "docs" / "benchmarks" / "gloo-rounds.json").read_text())
    page = (REPOSITORY / "docs" / "planning.md").read_text()
    assert section.section(report) in page


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_real_ranks_are_measured(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    assert ranks.BENCHMARK.main(["--ranks", "1", "2", "--rounds", "1", "--json", str(target)]) == 0
    groups = json.loads(target.read_text())["groups"]
    assert [group["constants"]["num_ranks"] for group in groups] == [1, 2]
    schemes = {row["scheme"] for row in groups[1]["rows"]}
    assert {"TP-2", "LP N=4 R=2", "LP N=4 R=2 + sharded MLP", "staged LP N=4 R=2"} <= schemes
    assert all(row["measured_ms"] > 0 for group in groups for row in group["rows"])
