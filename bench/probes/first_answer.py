"""`python -m bench first-answer`: how long `easyspec chat FILE` takes from its start to the answer of a question.

Each run is what a person types: a new process, which starts the services, answers and ends them. Times begin when the
process does. The first run finds nothing in the system's cache if the file was not read lately.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from bench.harness.pairs import PAIRS
from bench.harness.tables import Column, ResultTable, Row
from easyspec.errors import UnavailableError

_COLUMNS = (
    Column("run", "run"),
    Column("first text s", "first_text_s"),
    Column("answer s", "answer_s"),
    Column("ended s", "ended_s"),
    Column("answer", "answer"),
)


@dataclass(frozen=True)
class FirstAnswerSettings:
    model: Annotated[Path, flag("A GGUF file or a folder.")] = PAIRS["smollm2"].base
    question: Annotated[str, flag("What is asked, greedily.")] = "What is the capital of France?"
    max_tokens: Annotated[int, flag("Most tokens of the answer.", minimum=1)] = 64
    runs: Annotated[int, flag("How many times.", minimum=1)] = 5


def ask(settings: FirstAnswerSettings, run: int) -> Row:
    """Start `easyspec chat`, ask, and wait for its end: seconds from the start of the command to its first text, to the
    whole answer, and to its end. Raises UnavailableError if it fails or says nothing."""
    flags = ["--temperature", "0", "--max-tokens", str(settings.max_tokens)]
    command = [sys.executable, "-m", "easyspec.cli.main", "chat", str(settings.model), *flags]
    started = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(settings.question.encode() + b"\n")
        process.stdin.close()
        pieces: list[tuple[float, bytes]] = []
        while piece := os.read(process.stdout.fileno(), 65_536):
            pieces.append((time.monotonic() - started, piece))
        messages = process.stderr.read().decode()
    ended_s = time.monotonic() - started
    answer = b"".join(piece for _, piece in pieces).decode().strip()
    if process.returncode != 0 or not answer:
        raise UnavailableError(f"`easyspec chat` ended with {process.returncode}: {messages.strip()[-400:]}")
    last_s = max(at for at, piece in pieces if piece.strip())
    times = {"first_text_s": pieces[0][0], "answer_s": last_s, "ended_s": ended_s}
    return {"run": run, **{name: round(seconds, 2) for name, seconds in times.items()}, "answer": answer}


def measure(settings: FirstAnswerSettings, console: Console) -> Findings:
    answers = [ask(settings, run) for run in range(1, settings.runs + 1)]
    times = [answer["answer_s"] for answer in answers]
    return Findings(
        {"answers": answers, "median_answer_s": statistics.median(times), "longest_answer_s": max(times)},
        [ResultTable("From the start of the command", _COLUMNS, answers)],
        checkpoints=[settings.model],
    )


BENCHMARK = Benchmark("python -m bench first-answer", __doc__, FirstAnswerSettings, measure)
