"""One set of columns, for terminals and for Markdown."""

from __future__ import annotations

import io

from rich.console import Console

from bench.decode.decode import COLUMNS
from bench.decode.samples import PLAIN, select_modes
from bench.decode.summary import summarize
from bench.harness.tables import Column, ResultTable, markdown_table
from tests.bench.decode.samples import drafted_sample, plain_sample

TOKENS = tuple(range(7))


def test_a_narrow_terminal_cuts_no_figure_off() -> None:
    mode = select_modes(["n4-sequential-uncalibrated"])[1]
    rows = summarize([plain_sample(PLAIN, 0, 0.1, TOKENS), drafted_sample(mode, 0, 0.1, TOKENS)])
    output = io.StringIO()
    ResultTable("decoding", COLUMNS, rows).print(Console(file=output, width=40))
    text = output.getvalue()
    assert "…" not in text
    assert "n4-sequential-uncalibrated" in text
    assert "30.0" in text
    assert "rate by level" not in text


def test_markdown_has_every_column_and_a_dash_for_what_is_unknown() -> None:
    columns = [Column("a", "a"), Column("half", lambda row: row["b"] / 2, ".1f"), Column("c", "c", is_detail=True)]
    assert markdown_table(columns, [{"a": "x", "b": 3}]) == "| a | half | c |\n|---|---:|---:|\n| x | 1.5 | - |"
