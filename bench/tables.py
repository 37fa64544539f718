"""Results as tables: for the terminal and for Markdown, from the same columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

RESULT_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("mode", lambda row: row["mode"]),
    ("T", lambda row: f"{row['temperature']:g}"),
    ("tokens/s", lambda row: _number(row["tokens_per_s"], 1)),
    ("x plain", lambda row: _number(row["speedup_vs_plain"], 2)),
    ("draft ms", lambda row: _number(row["draft_ms_per_round"], 2)),
    ("calibrate ms", lambda row: _number(row["calibrate_ms_per_round"], 2)),
    ("fuzzy ms", lambda row: _number(row["fuzzy_ms_per_round"], 2)),
    ("ms/fuzzy step", lambda row: _number(row["fuzzy_ms_per_step"], 2)),
    ("verify ms", lambda row: _number(row["verify_ms_per_round"], 2)),
    ("overhead ms", lambda row: _number(row["overhead_ms_per_round"], 2)),
    ("rate", lambda row: _number(row["acceptance_rate"], 3)),
    ("rate by level", lambda row: " ".join(f"{rate:.2f}" for rate in row["acceptance_by_level"]) or "-"),
    ("length", lambda row: _number(row["mean_acceptance_length"], 2)),
    ("differ", lambda row: str(row["num_differing_completions"])),
)

SERVE_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("streams", lambda row: str(row["concurrency"])),
    ("speculation", lambda row: row["speculation"]),
    ("tokens/s", lambda row: _number(row["tokens_per_s"], 1)),
    ("x best", lambda row: _with_error(row["vs_best"], row.get("vs_best_error"))),
    ("TTFT ms", lambda row: _percentiles(row["ttft_ms"])),
    ("inter-token ms", lambda row: _percentiles(row["inter_token_ms"])),
    ("length", lambda row: _number(row["mean_acceptance_length"], 2)),
    ("drafted", lambda row: f"{row['draft_share']:.0%}"),
    ("occupancy", lambda row: _number(row["batch_occupancy"], 2)),
    ("rows", lambda row: _number(row["batch_rows"], 1)),
    ("KV use", lambda row: _number(row["kv_use"], 2)),
)

TARGET_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("model", lambda row: row["model"]),
    ("layers", lambda row: str(row["num_layers"])),
    ("speculation", lambda row: row["speculation"]),
    ("tokens/s", lambda row: _number(row["tokens_per_s"], 1)),
    ("x plain", lambda row: _number(row["vs_plain"], 2)),
    ("x plain by turn", lambda row: " ".join(f"{ratio:.2f}" for ratio in row["vs_plain_by_turn"]) or "-"),
    ("length", lambda row: _number(row["mean_acceptance_length"], 2)),
    ("drafted", lambda row: f"{row['draft_share']:.0%}"),
    ("compared", lambda row: str(row["num_compared_tokens"])),
    ("differ", lambda row: str(row["num_differing"])),
)


# What a terminal of common width has no room for is in the file.
_TERMINAL_HEADINGS = [
    heading for heading, _ in RESULT_COLUMNS if heading not in ("calibrate ms", "fuzzy ms", "rate by level")
]
_MIN_WIDTH = 120


def print_results(rows: Sequence[Row], console: Console) -> None:
    """Every result as one row; a narrow terminal breaks lines rather than cutting figures off."""
    columns = [column for column in RESULT_COLUMNS if column[0] in _TERMINAL_HEADINGS]
    table = Table(title="decode phase, medians over prompts; times per round", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for index, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    Console(file=console.file, width=max(console.width, _MIN_WIDTH)).print(table)


def print_serve_results(rows: Sequence[Row], console: Console) -> None:
    """Every result as one row; nothing without results."""
    if rows:
        print_table(SERVE_COLUMNS, rows, "medians over windows; times are p50/p95/p99", console)


def print_target_results(rows: Sequence[Row], console: Console) -> None:
    """Every model and setting as one row."""
    print_table(TARGET_COLUMNS, rows, "all models at the same time; medians over windows", console)


def print_table(
    columns: Sequence[tuple[str, Callable[[Row], str]]], rows: Sequence[Row], title: str, console: Console
) -> None:
    """Every row under a title."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    Console(file=console.file, width=max(console.width, _MIN_WIDTH)).print(table)


def markdown_table(columns: Sequence[tuple[str, Callable[[Row], str]]], rows: Sequence[Row]) -> str:
    """A Markdown table, first column left, the others right."""
    lines = [
        "| " + " | ".join(heading for heading, _ in columns) + " |",
        "|---" + "|---:" * (len(columns) - 1) + "|",
    ]
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return "\n".join(lines)


def _with_error(value: float | None, error: float | None) -> str:
    return _number(value, 2) if value is None or error is None else f"{value:.2f} ± {error:.2f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percentiles(values: Mapping[str, float] | None) -> str:
    return "-" if values is None else "/".join(f"{values[name]:.0f}" for name in ("p50", "p95", "p99"))
