"""`python -m bench.report`: docs/benchmarks.md, a page beside each result file, and a part of docs/planning.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.alternatives.prefill import prefill_headline, prefill_section
from bench.alternatives.summary import alternatives_section
from bench.decode.decode import decode_section
from bench.harness.benchmark import Benchmark, Findings
from bench.harness.machine import REPOSITORY
from bench.ranks import section as ranks_section
from bench.report import headlines, text
from bench.serving.serve import serve_section
from bench.serving.targets import targets_section
from bench.sources.sources import sources_section

RESULTS = REPOSITORY / "docs" / "benchmarks"


@dataclass(frozen=True)
class Kind:
    """Result files whose names begin alike: how the page of one, and its rows on the page of all, are made."""

    title: str
    prefixes: tuple[str, ...]
    section: Callable[[str, Mapping[str, Any]], str]
    headline: Callable[[Mapping[str, Any]], str]
    head: str = ""


KINDS = (
    Kind("Beside other programs", ("alternatives",), alternatives_section, headlines.alternatives_headline),
    Kind("Long prompts", ("prefill",), prefill_section, prefill_headline),
    Kind("One stream", ("decode",), decode_section, headlines.decode_headline, text.DECODE),
    Kind("Many streams", ("serve",), serve_section, headlines.serve_headline, text.SERVE),
    Kind("Sources of guesses", ("sources", "exits"), sources_section, headlines.sources_headline),
    Kind("Two base models behind one drafter", ("targets",), targets_section, headlines.targets_headline),
)


@dataclass(frozen=True)
class ReportSettings:
    """Nothing to choose."""


def measure(settings: ReportSettings, console: Console) -> Findings:
    """Write all pages; nothing is measured."""
    reports = {path.name: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))}
    for name, report in reports.items():
        if (kind := kind_of(name)) is not None:
            RESULTS.joinpath(name).with_suffix(".md").write_text(details(kind, name, report), "utf-8")
    RESULTS.with_suffix(".md").write_text(overview(reports), "utf-8")
    if (rounds := reports.get("gloo-rounds.json")) is not None:
        ranks_section.refresh(REPOSITORY / "docs" / "planning.md", rounds)
    return Findings({}, notes=[f"docs/benchmarks.md: {len(reports)} runs"])


def kind_of(name: str) -> Kind | None:
    return next((kind for kind in KINDS if name.partition("-")[0].removesuffix(".json") in kind.prefixes), None)


def details(kind: Kind, name: str, report: Mapping[str, Any]) -> str:
    """The page of one result file, with its plot if there is one."""
    head = text.PAGE_HEAD.format(source=f"[{name}]({name})")
    parts = [kind.section(name, report).removeprefix("#"), head, kind.head]
    plot = Path(name).with_suffix(".png")
    if (RESULTS / plot).is_file():
        parts.append(f"![the same as a picture]({plot})\n")
    return "\n".join(part for part in parts if part)


def overview(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of all: the few rows of each result that matter most."""
    parts = ["# Benchmarks\n", text.PAGE_HEAD.format(source="the files in `docs/benchmarks/`")]
    for kind in KINDS:
        own = {name: report for name, report in reports.items() if kind_of(name) is kind}
        if own:
            parts.append(f"## {kind.title}\n")
        for name, report in own.items():
            pair = report["pair"] if isinstance(report["pair"], str) else report["pair"]["name"]
            executor = report.get("settings", {}).get("executor", "auto")
            way = "" if executor == "auto" else f", executor {executor}"
            parts.append(
                f"The {pair} pair{way}, commit {report['commit']}, {report['date']} "
                f"([all rows]({RESULTS.name}/{Path(name).stem}.md)):\n"
            )
            parts.append(kind.headline(report) + "\n")
    return "\n".join([*parts, text.SERVERS] if reports else [*parts, "No results yet: `make bench` makes some.\n"])


BENCHMARK = Benchmark("python -m bench.report", __doc__, ReportSettings, measure)
