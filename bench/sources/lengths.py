"""How much longer a round of all sources fused is than one of the best single source, from rows of `bench sources`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.harness.benchmark import as_plain
from bench.harness.tables import Column, Row
from easyspec.speculation.sources import TEXT_SOURCES, DraftSources

GAIN_COLUMNS = (
    Column("task", "task"),
    Column("nodes", "node_budget"),
    Column("T", lambda row: "all" if row["temperature"] is None else f"{row['temperature']:g}"),
    Column("all fused", "fused", ".2f"),
    Column("best single", lambda row: f"{row['best_single']:.2f} ({row['best_source']})"),
    Column("ratio", lambda row: row["fused"] / row["best_single"], ".2f"),
)
_FUSED = frozenset((DraftSources.MODEL | TEXT_SOURCES).names)


@dataclass(frozen=True)
class LengthGain:
    """Mean acceptance lengths on a task. `temperature` None: as many tokens of every temperature of the run."""

    task: str
    node_budget: int
    temperature: float | None
    fused: float
    best_single: float
    best_source: str

    @property
    def ratio(self) -> float:
        """Fused against the best single source."""
        return self.fused / self.best_single


def length_gains(rows: Iterable[Row]) -> list[LengthGain]:
    """By task, budget and temperature, and over temperatures where there are several; nothing for what lacks a fused
    row, or a single source that drafted. Over temperatures the best source is the one that is best over all of them."""
    lengths: dict[tuple[str, int], dict[frozenset[str], dict[float, float]]] = {}
    for row in rows:
        by_set = lengths.setdefault((row["task"], row["node_budget"]), {})
        by_set.setdefault(frozenset(row["sources"]), {})[row["temperature"]] = row["mean_acceptance_length"]
    gains: list[LengthGain] = []
    for (task, node_budget), by_set in sorted(lengths.items()):
        temperatures = sorted({temperature for of_set in by_set.values() for temperature in of_set})
        choices: list[tuple[float | None, Sequence[float]]] = [(one, [one]) for one in temperatures]
        if len(temperatures) > 1:
            choices.append((None, temperatures))
        for temperature, pooled in choices:
            # Tokens by rounds, where every temperature has as many tokens.
            means = {
                sources: statistics.harmonic_mean([of_set[each] for each in pooled])
                for sources, of_set in by_set.items()
                if of_set.keys() >= {*pooled}
            }
            singles = {next(iter(sources)): mean for sources, mean in means.items() if len(sources) == 1}
            if _FUSED in means and any(singles.values()):
                best = max(singles, key=lambda name: singles[name])
                gains.append(LengthGain(task, node_budget, temperature, means[_FUSED], singles[best], best))
    return gains


def gain_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """As a table has them."""
    return [as_plain(gain) for gain in length_gains(rows)]
