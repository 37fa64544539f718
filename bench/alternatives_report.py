"""The figures of `bench alternatives`: summary, terminal table and section of docs/benchmarks.md."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from bench.provenance import provenance_lines
from bench.tables import Row, markdown_table, print_table
from bench.timed_completion import Maker, TimedCompletion

_REFERENCE = Maker("transformers")

COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("by", lambda row: f"{row['program']}, {row['way']}"),
    ("task", lambda row: row["task"]),
    ("T", lambda row: f"{row['temperature']:g}"),
    ("tokens/s", lambda row: f"{row['tokens_per_s']:.1f}"),
    ("x transformers", lambda row: f"{row['vs_transformers']:.2f}"),
    ("as its own plain", lambda row: f"{row['num_as_plain']} of {row['num_completions']}"),
)


@dataclasses.dataclass(frozen=True)
class AlternativeResult:
    """One row. Speeds are medians over prompts, `vs_transformers` of per-prompt ratios to its plain decoding.

    `num_as_plain` counts completions with the tokens that the same program says without speculation.
    """

    program: str
    way: str
    task: str
    temperature: float
    tokens_per_s: float
    vs_transformers: float
    num_as_plain: int
    num_completions: int


def summarize_alternatives(completions: Sequence[TimedCompletion]) -> list[AlternativeResult]:
    """One row per kind of task, temperature and maker, who must all have completed the same prompts."""
    by_key = {(one.maker, one.task_name, one.temperature, one.prompt_index): one for one in completions}
    groups: dict[tuple[str, float, Maker], list[TimedCompletion]] = {}
    for one in completions:
        groups.setdefault((one.task_name, one.temperature, one.maker), []).append(one)

    def same_by(maker: Maker, one: TimedCompletion) -> TimedCompletion:
        return by_key[maker, one.task_name, one.temperature, one.prompt_index]

    return [
        AlternativeResult(
            program=maker.program,
            way=maker.way,
            task=task_name,
            temperature=temperature,
            tokens_per_s=statistics.median(one.tokens_per_s for one in group),
            vs_transformers=statistics.median(
                one.tokens_per_s / same_by(_REFERENCE, one).tokens_per_s for one in group
            ),
            num_as_plain=sum(one.token_ids == same_by(maker.plain, one).token_ids for one in group),
            num_completions=len(group),
        )
        for (task_name, temperature, maker), group in groups.items()
    ]


def print_alternatives(results: Sequence[AlternativeResult], console: Console) -> None:
    """Every result as one row."""
    title = "whole completions, reading the prompt included; medians over prompts"
    print_table(COLUMNS, [dataclasses.asdict(result) for result in results], title, console)


def alternatives_section(name: str, report: Mapping[str, Any]) -> str:
    """One run as Markdown."""
    settings = report["settings"]
    return "\n".join(
        [
            f"## What users would otherwise pick, the {report['pair']} pair ({name})\n",
            f"The same checkpoints and prompts by transformers {report['transformers']} inside the measuring process, "
            "and by easyspec's",
            "three services over gRPC, one request at a time, in rotating order. *tokens/s* is of whole completions, "
            "reading the",
            "prompt included. *x transformers* is the median of per-prompt ratios to transformers' plain decoding. "
            "*as its own plain*",
            "counts completions with the very tokens that the same program says without speculation, from the same "
            "seed.",
            "easyspec keeps prompts it has read: of the turns of a prompt it reads only the first in full, so the "
            "second temperature",
            "and whichever of its two ways comes second flatter it.\n",
            *provenance_lines(report),
            f"* {settings['num_prompts']} held-out prompts of each kind, {settings['max_tokens']} tokens each, "
            f"seed {settings['seed']}\n",
            markdown_table(COLUMNS, report["results"]) + "\n",
        ]
    )
