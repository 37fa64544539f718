"""The section of `bench targets` in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.provenance import provenance_lines
from bench.tables import TARGET_COLUMNS, markdown_table


def targets_section(name: str, report: Mapping[str, Any]) -> str:
    """One run as Markdown."""
    settings = report["settings"]
    return "\n".join(
        [
            f"## Two base models behind one drafter: the {report['pair']} ones ({name})\n",
            "All models have the same load at the same time; windows without and with drafts next to each other, in",
            "rotating order. *x plain* is the median of per-turn ratios of a model to itself, *compared* the tokens of",
            "requests that were asked both ways, *differ* the requests that said something else.\n",
            *provenance_lines(report),
            f"* {_streams(settings['num_streams'])} of each model, mix {settings['mix']}, seed {settings['seed']}; "
            f"{settings['num_turns']} windows of {settings['window_s']:g} s of each setting\n",
            markdown_table(TARGET_COLUMNS, report["results"]) + "\n",
        ]
    )


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"
