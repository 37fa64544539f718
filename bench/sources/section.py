"""The section of `bench sources` in the pages of results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.harness.provenance import provenance_lines
from bench.harness.tables import markdown_table
from bench.sources.lengths import GAIN_COLUMNS, length_gains
from bench.sources.sources import COLUMNS

_ASKED = {
    "where-it-pays": "the drafter asks the sources that pay in each round",
    "always": "all sources of a request are asked in every round (`--ask always`)",
}


def sources_section(name: str, report: Mapping[str, Any]) -> str:
    """One run as Markdown."""
    settings, rows = report["settings"], report["results"]
    order = sorted(rows, key=lambda row: (row["task"], row["temperature"], row["node_budget"], len(row["sources"])))
    lines = [
        f"## Sources of guesses, the {report['pair']} pair ({name})\n",
        *provenance_lines(report),
        f"* {settings['num_prompts']} held-out prompts of each kind, {settings['max_tokens']} tokens each, "
        f"seed {settings['seed']}; the index and n-gram table are of the models' training text; "
        f"{_ASKED[settings.get('ask', 'where-it-pays')]}\n",
        markdown_table(COLUMNS, order) + "\n",
    ]
    if gains := length_gains(rows):
        lines.append("Tokens a round of model, retrieval and n-grams fused, and of the best of them alone:\n")
        lines.append(markdown_table(GAIN_COLUMNS, gains) + "\n")
    return "\n".join(lines)
