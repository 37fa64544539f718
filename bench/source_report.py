"""The section and the plot of `bench sources` in docs/benchmarks.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.provenance import provenance_lines
from bench.source_lengths import length_gains
from bench.tables import Row, markdown_table

_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("task", lambda row: row["task"]),
    ("sources", lambda row: "+".join(row["sources"])),
    ("nodes", lambda row: str(row["node_budget"])),
    ("T", lambda row: f"{row['temperature']:g}"),
    ("length", lambda row: f"{row['mean_acceptance_length']:.2f}"),
    ("draft ms", lambda row: f"{row['draft_ms_per_round']:.2f}"),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:.1f}"),
    ("x plain", lambda row: f"{row['speedup_vs_plain']:.2f}"),
)

GAIN_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("task", lambda row: row["task"]),
    ("nodes", lambda row: str(row["node_budget"])),
    ("T", lambda row: "all" if row["temperature"] is None else f"{row['temperature']:g}"),
    ("all fused", lambda row: f"{row['fused']:.2f}"),
    ("best single", lambda row: f"{row['best_single']:.2f} ({row['best_source']})"),
    ("ratio", lambda row: f"{row['fused'] / row['best_single']:.2f}"),
)
_ASKED = {
    "where-it-pays": "the drafter asks whom it pays to ask in each round",
    "always": "all sources of a request are asked in every round (`--ask always`)",
}


def sources_section(name: str, report: Mapping[str, Any]) -> str:
    """One run as Markdown; its plot stands beside its JSON file."""
    settings = report["settings"]
    order = sorted(
        report["results"], key=lambda row: (row["task"], row["temperature"], row["node_budget"], len(row["sources"]))
    )
    return "\n".join(
        [
            f"## Sources of guesses, the {report['pair']} pair ({name})\n",
            *provenance_lines(report),
            f"* {settings['num_prompts']} held-out prompts of each kind, {settings['max_tokens']} tokens each, "
            f"seed {settings['seed']}; the index and n-gram table are of the models' training text; "
            f"{_ASKED[settings.get('ask', 'where-it-pays')]}\n",
            f"![Mean acceptance length by nodes and sources](benchmarks/{Path(name).stem}.svg)\n",
            markdown_table(_COLUMNS, order) + "\n",
            *_gain_lines(report["results"]),
        ]
    )


def _gain_lines(rows: Sequence[Row]) -> list[str]:
    gains = [dataclasses.asdict(gain) for gain in length_gains(rows)]
    if not gains:
        return []
    return [
        "Tokens a round of model, retrieval and n-grams fused, and of the best of them alone:\n",
        markdown_table(GAIN_COLUMNS, gains) + "\n",
    ]


def plot_sources(report: Mapping[str, Any], path: Path) -> None:
    """Mean acceptance length over nodes, one panel a task and temperature, one line a set of sources."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    rows = report["results"]
    panels = sorted({(row["task"], row["temperature"]) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), sharey=True, squeeze=False)
    for axis, (task, temperature) in zip(axes[0], panels, strict=True):
        inside = [row for row in rows if (row["task"], row["temperature"]) == (task, temperature)]
        for sources in dict.fromkeys("+".join(row["sources"]) for row in inside):
            line = sorted(
                (row["node_budget"], row["mean_acceptance_length"])
                for row in inside
                if "+".join(row["sources"]) == sources
            )
            axis.plot(*zip(*line, strict=True), marker="o", markersize=3, label=sources)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{task}, T = {temperature:g}", fontsize=9)
        axis.set_xlabel("nodes of a tree")
    axes[0][0].set_ylabel("tokens per round")
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
