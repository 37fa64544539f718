"""What a check found, and how it is told."""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text


class State(enum.Enum):
    """OK; WARNING: it runs, but not as it could; PROBLEM: it will not run."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report; `advice` says what to do, and is empty only where all is well."""

    check: str
    state: State
    message: str
    advice: str = ""


def ok(check: str, message: str) -> Finding:
    return Finding(check, State.OK, message)


def warning(check: str, message: str, advice: str) -> Finding:
    return Finding(check, State.WARNING, message, advice)


def problem(check: str, message: str, advice: str) -> Finding:
    return Finding(check, State.PROBLEM, message, advice)


def has_problem(findings: Sequence[Finding]) -> bool:
    return any(finding.state is State.PROBLEM for finding in findings)


def print_report(findings: Sequence[Finding]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    styles = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "bold red"}
    width = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        line = Text(f"{finding.state.value:<8}", style=styles[finding.state])
        line.append(f" {finding.check:<{width}}  ", style="bold")
        line.append(finding.message, style="default")
        if finding.advice:
            line.append(f" → {finding.advice}", style="cyan")
        console.print(line)
    counts = {state: sum(finding.state is state for finding in findings) for state in State}
    console.print(", ".join(f"{count} {state.value}" for state, count in counts.items()))


def report_as_json(findings: Sequence[Finding]) -> str:
    """The report for programs: `{"has_problem": ..., "checks": [{"check", "state", "message", "advice"}]}`."""
    checks = [vars(finding) | {"state": finding.state.value} for finding in findings]
    return json.dumps({"has_problem": has_problem(findings), "checks": checks}, ensure_ascii=False, indent=2)
