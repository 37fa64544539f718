"""The picture of a serving benchmark: throughput and latencies over the number of streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from easyspec.errors import ConfigurationError

_STYLES = {"off": ("#888888", "o"), "on": ("#c23b22", "s"), "auto": ("#1f6f8b", "^")}
_PANELS: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None]], ...] = (
    ("output tokens/s", lambda row: row["tokens_per_s"]),
    ("time to first token, p95, ms", lambda row: row["ttft_ms"] and row["ttft_ms"]["p95"]),
    ("inter-token time, p95, ms", lambda row: row["inter_token_ms"] and row["inter_token_ms"]["p95"]),
)


def write_plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw `results` of a report into a PNG; raises ConfigurationError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigurationError("the plot needs matplotlib: pip install 'easyspec[bench]'") from error
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for name, (colour, marker) in _STYLES.items():
            points = [
                (row["concurrency"], y)
                for row in results
                if row["speculation"] == name and (y := value(row)) is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=f"speculation {name}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("concurrent streams")
        axes.set_title(title)
        axes.grid(visible=True, which="both", alpha=0.3)
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
