"""The few rows of a result that docs/benchmarks.md shows: easyspec's best beside what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.harness.tables import Column, Row, markdown_table
from bench.serving import targets

Report = Mapping[str, Any]


def alternatives_headline(report: Report) -> str:
    columns = (
        Column("task", "task"),
        Column("T", "temperature", "g"),
        Column("easyspec, tokens/s", "tokens_per_s", ".1f"),
        Column("decoding alone", "decode_tokens_per_s", ".1f"),
        Column("x transformers", "vs_transformers", ".2f"),
        Column("x best other", "vs_best_other", ".2f"),
        Column("as plain", lambda row: f"{row['num_as_plain']} of {row['num_completions']}"),
    )
    rows = [row for row in report["results"] if (row["program"], row["way"]) == ("easyspec", "speculating")]
    return markdown_table(columns, rows)


def decode_headline(report: Report) -> str:
    """The fastest mode at each temperature, beside plain decoding."""
    columns = (
        Column("T", "temperature", "g"),
        Column("plain, tokens/s", "plain", ".1f"),
        Column("fastest mode", "mode"),
        Column("tokens/s", "tokens_per_s", ".1f"),
        Column("x plain", "speedup_vs_plain", ".2f"),
        Column("length", "mean_acceptance_length", ".2f"),
    )
    rows = [
        {**max(same, key=lambda row: row["tokens_per_s"]), "plain": same[0]["tokens_per_s"]}
        for same in _grouped(report["results"], "temperature")
    ]
    return markdown_table(columns, rows)


def serve_headline(report: Report) -> str:
    settings = ("off", "on", "auto")
    columns = (
        Column("streams", "concurrency"),
        *(Column(f"{name}, tokens/s", name, ".1f") for name in settings),
        Column("auto, x best", "vs_best", ".2f"),
        Column("auto, TTFT p95 ms", lambda row: row["ttft_ms"] and row["ttft_ms"]["p95"], ".0f"),
    )
    rows = [
        {**same[-1], **{row["speculation"]: row["tokens_per_s"] for row in same}}
        for same in _grouped(report["results"], "concurrency")
    ]
    return markdown_table(columns, rows)


def sources_headline(report: Report) -> str:
    """The fastest set by task and temperature, beside model, retrieval and n-grams fused."""
    fused = {"model", "retrieval", "ngram"}
    columns = (
        Column("task", "task"),
        Column("T", "temperature", "g"),
        Column("fused, tokens/s", "fused", ".1f"),
        Column("x plain", "fused_x", ".2f"),
        Column("fastest set", lambda row: "+".join(row["sources"])),
        Column("nodes", "node_budget"),
        Column("tokens/s", "tokens_per_s", ".1f"),
    )
    rows = []
    for same in _grouped(report["results"], "task", "temperature"):
        best = max(same, key=lambda row: row["tokens_per_s"])
        all_three = max(
            (row for row in same if set(row["sources"]) == fused), key=lambda row: row["tokens_per_s"], default={}
        )
        row = {"fused": all_three.get("tokens_per_s"), "fused_x": all_three.get("speedup_vs_plain")}
        rows.append({**best, **row})
    return markdown_table(columns, rows)


def targets_headline(report: Report) -> str:
    columns = [column for column in targets.COLUMNS if column.heading not in ("x plain by turn", "compared")]
    return markdown_table(columns, report["results"])


def _grouped(rows: Sequence[Row], *keys: str) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())
