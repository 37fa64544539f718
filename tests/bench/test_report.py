from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from bench.measurement import PLAIN, select_modes
from bench.report import render
from bench.summary import summarize
from bench.tables import print_results
from tests.bench.samples import drafted_sample, plain_sample

TOKENS = tuple(range(7))


def _rows() -> list[dict[str, object]]:
    mode = select_modes(["n4-sequential-uncalibrated"])[1]
    results = summarize([plain_sample(PLAIN, 0, 0.1, TOKENS), drafted_sample(mode, 0, 0.1, TOKENS)])
    return [dataclasses.asdict(result) for result in results]


def test_a_narrow_terminal_cuts_no_figure_off() -> None:
    output = io.StringIO()
    print_results(_rows(), Console(file=output, width=40))
    text = output.getvalue()
    assert "…" not in text
    assert "n4-sequential-uncalibrated" in text
    assert "30.0" in text


def test_without_results_the_document_says_so() -> None:
    assert render({}).endswith("No results yet: `make bench` makes some.\n")
