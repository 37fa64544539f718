"""How much longer a round of all sources fused is than one of the best single source, from rows of `bench sources`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

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


def length_gains(rows: Iterable[Row]) -> list[Row]:
    """Mean acceptance lengths by task, budget and temperature, and over temperatures (None) where there are several;
    nothing for what lacks a fused row, or a single source that drafted. Over temperatures every one counts as many
    tokens, and the best source is the one that is best over all of them."""
    lengths: dict[tuple[str, int], dict[frozenset[str], dict[float, float]]] = {}
    for row in rows:
        by_set = lengths.setdefault((row["task"], row["node_budget"]), {})
        by_set.setdefault(frozenset(row["sources"]), {})[row["temperature"]] = row["mean_acceptance_length"]
    gains: list[Row] = []
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
                lengths_of = {"fused": means[_FUSED], "best_single": singles[best], "best_source": best}
                gains.append({"task": task, "node_budget": node_budget, "temperature": temperature, **lengths_of})
    return gains
