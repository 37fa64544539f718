"""The section and the plot of `bench sources` in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.provenance import provenance_lines
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
            f"seed {settings['seed']}; the index and n-gram table are of the models' training text\n",
            f"![Mean acceptance length by nodes and sources](benchmarks/{Path(name).stem}.svg)\n",
            markdown_table(_COLUMNS, order) + "\n",
        ]
    )


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
