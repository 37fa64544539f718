"""The figures of `bench alternatives`: summary, columns and section of the pages."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench.alternatives.timed_completion import Maker, TimedCompletion
from bench.harness.provenance import provenance_lines
from bench.harness.tables import Column, Row, markdown_table

OURS = "easyspec"
_TRANSFORMERS = Maker("transformers")
COLUMNS = (
    Column("by", lambda row: f"{row['program']}, {row['way']}"),
    Column("task", "task"),
    Column("T", "temperature", "g"),
    Column("tokens/s", "tokens_per_s", ".1f"),
    Column("decoding", "decode_tokens_per_s", ".1f"),
    Column("x transformers", "vs_transformers", ".2f"),
    Column("x best other", "vs_best_other", ".2f"),
    Column(
        "as its own plain",
        lambda row: None if row["num_as_plain"] is None else f"{row['num_as_plain']} of {row['num_completions']}",
    ),
)


def summarize_alternatives(completions: Sequence[TimedCompletion]) -> list[Row]:
    """One row per kind of task, temperature and maker; all makers must have completed the same prompts.

    Speeds are medians over prompts, of whole completions and from the first token to the last. `vs_transformers` and
    `vs_best_other` are medians of per-prompt ratios of whole completions: to transformers' plain decoding, and to the
    fastest way of any program but easyspec. `num_as_plain` counts completions with the tokens that the same program
    says without speculation. None is what was not measured.
    """
    groups: dict[tuple[str, float], dict[Maker, dict[int, TimedCompletion]]] = {}
    for one in completions:
        makers = groups.setdefault((one.task_name, one.temperature), {})
        makers.setdefault(one.maker, {})[one.prompt_index] = one
    rows: list[Row] = []
    for (task_name, temperature), makers in groups.items():
        speeds = {maker: statistics.median(one.tokens_per_s for one in own.values()) for maker, own in makers.items()}
        others = [maker for maker in makers if maker.program != OURS]
        best_other = max(others, key=lambda other: speeds[other], default=None)
        for maker, own in makers.items():
            decode_speeds = [one.decode_tokens_per_s for one in own.values()]
            num_as_plain = None
            if (plain := makers.get(maker.plain)) is not None:
                num_as_plain = sum(one.answer.content == plain[index].answer.content for index, one in own.items())
            rows.append(
                {
                    "program": maker.program,
                    "way": maker.way,
                    "task": task_name,
                    "temperature": temperature,
                    "tokens_per_s": speeds[maker],
                    "decode_tokens_per_s": None
                    if None in decode_speeds
                    else statistics.median(filter(None, decode_speeds)),
                    "vs_transformers": _ratio(own, makers.get(_TRANSFORMERS)),
                    "vs_best_other": _ratio(own, makers[best_other] if best_other else None),
                    "num_as_plain": num_as_plain,
                    "num_completions": len(own),
                }
            )
    return rows


def _ratio(own: Mapping[int, TimedCompletion], other: Mapping[int, TimedCompletion] | None) -> float | None:
    if other is None:
        return None
    return statistics.median(one.tokens_per_s / other[index].tokens_per_s for index, one in own.items())


def alternatives_section(name: str, report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    others = [f"transformers {report['transformers']} inside the measuring process"] if report["transformers"] else []
    others += [f"the server {server}" for server in report.get("servers", [])]
    return "\n".join(
        [
            f"## What users would otherwise pick, the {report['pair']} pair ({name})\n",
            "The same checkpoints and prompts by easyspec's three services over gRPC and by other programs, one",
            f"request at a time, in rotating order: {', '.join(others)}.",
            "*tokens/s* is of whole completions, reading the prompt included; *decoding* is from the first token to",
            "the last, where they are streamed. *x transformers* is the median of per-prompt ratios of whole",
            "completions to transformers' plain decoding, *x best other* to the fastest way that is not easyspec's.",
            "*as its own plain* counts completions with the very tokens that the same program says without",
            "speculation, from the same seed. easyspec keeps prompts it has read: of the turns of a prompt it reads",
            "only the first in full, so the second temperature and whichever of its two ways comes second flatter it;",
            "*decoding* is free of that.\n",
            *provenance_lines(report),
            f"* {settings['num_prompts']} held-out prompts of each kind, {settings['max_tokens']} tokens each, "
            f"seed {settings['seed']}\n",
            markdown_table(COLUMNS, report["results"]) + "\n",
        ]
    )
