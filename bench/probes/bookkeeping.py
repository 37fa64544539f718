"""`python -m bench bookkeeping`: what the verifier's Python takes beside its passes where texts or sessions are many.

Time is processor time of the device thread, less what it spends inside the library, so that a busy machine changes
little. The model is as small as one can be: its passes do not matter here.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from rich.console import Console

from bench.harness.benchmark import Benchmark, Findings
from bench.harness.flags import flag
from bench.harness.random_weights import random_decoder, write_config
from bench.harness.tables import Column, ResultTable, Row
from easyspec.engine.shell import CloseTask
from easyspec.free_memory import settle_memory
from easyspec.model.kv_cache import KvMemory
from easyspec.ops.executor import choose_executor
from easyspec.ops.native_library import load
from easyspec.planner.shape import ModelShape
from easyspec.speculation.messages import OpenVerification
from easyspec.speculation.parameters import SamplingParameters, StopConditions
from easyspec.speculation.token_tree import EMPTY_TREE, TokenTree
from verifier_service.scheduler import SchedulerLimits
from verifier_service.verifier import OpenTask, Verifier, VerifierLimits, VerifyTask

_VOCAB = 256
_SHAPE = ModelShape("tiny", 1, 32, 2, 1, 16, 32, _VOCAB)
_MAX_LEN = 1 << 18
_WINDOW = 128
_TREE = TokenTree(tuple(range(1, 8)), (0, 0, 1, 1, 2, 2, 3))
_READING = (Column("tokens", "num_tokens"), Column("seconds", "seconds"), Column("us a token", "us_a_token"))
_STEPS = (
    Column("sessions", "num_sessions"),
    Column("tokens before", "num_context_tokens"),
    Column("median ms", "median_ms"),
    Column("p99 ms", "p99_ms"),
)


@dataclass(frozen=True)
class BookkeepingSettings:
    steps: Annotated[int, flag("Steps to time.", minimum=2)] = 100


@contextmanager
def outside_library() -> Iterator[Callable[[], int]]:
    """Gives a clock: processor time of this thread outside the library, in nanoseconds."""
    inside_ns = 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal inside_ns
            started_ns = time.thread_time_ns()
            result = function(*arguments)
            inside_ns += time.thread_time_ns() - started_ns
            return result

        return call

    library = load()  # the same for all
    originals = {name: getattr(library, name) for name in ("easyspec_program_run", "easyspec_choose")}
    for name, function in originals.items():
        setattr(library, name, timed(function))
    try:
        yield lambda: time.thread_time_ns() - inside_ns
    finally:
        for name, function in originals.items():
            setattr(library, name, function)


def new_verifier(folder: Path, num_slots: int, max_sessions: int) -> Verifier:
    """A verifier of a model of one layer, which takes texts of any length."""
    decoder = random_decoder(folder, choose_executor("native", torch.device("cpu"), num_threads=1))
    memory = KvMemory(decoder.new_pool(num_slots), shares_prefixes=True)
    limits = SchedulerLimits(
        max_batch_rows=max(512, 10 * max_sessions),
        prefill_chunk=512,
        max_tree_nodes=16,
        max_waiting_sessions=max_sessions,
        retry_after_s=1.0,
        max_prefill_slowdown=1.7,
    )
    return Verifier(decoder, memory, VerifierLimits("bench", _MAX_LEN, 16), limits)


def _opened(verifier: Verifier, prompt: Sequence[int]) -> int:
    stop = StopConditions(max_tokens=4096, ignore_eos=True)
    opening = OpenTask(OpenVerification(tuple(prompt), SamplingParameters(seed=0, temperature=0.8), stop))
    verifier.accept(opening)
    return opening.future.result(timeout=0)


def _prompts(num_prompts: int, num_tokens: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, _VOCAB, num_tokens).tolist() for _ in range(num_prompts)]


def time_reading(folder: Path, num_tokens: int) -> Row:
    """Read one prompt that shares nothing with another."""
    (prompt,) = _prompts(1, num_tokens)
    with outside_library() as now_ns:
        verifier = new_verifier(folder, num_tokens + 64, 1)
        started_ns = now_ns()
        task = VerifyTask(_opened(verifier, prompt), num_tokens, EMPTY_TREE)
        verifier.accept(task)
        while not task.future.done():
            verifier.step()
        seconds = (now_ns() - started_ns) / 1e9
    task.future.result()
    us_a_token = round(1e6 * seconds / num_tokens, 2)
    return {"num_tokens": num_tokens, "seconds": round(seconds, 4), "us_a_token": us_a_token}


def time_steps(folder: Path, num_sessions: int, num_tokens: int, num_steps: int) -> Row:
    """Let sessions decode with trees of seven nodes, all in one pass; what is timed begins when all have read."""
    with outside_library() as now_ns:
        verifier = new_verifier(folder, num_sessions * (num_tokens + 1024), num_sessions)
        lengths = {_opened(verifier, prompt): num_tokens for prompt in _prompts(num_sessions, num_tokens)}
        _round(verifier, lengths, EMPTY_TREE, now_ns)
        settle_memory()  # as a service does
        times_ms = [_round(verifier, lengths, _TREE, now_ns) for _ in range(num_steps)]
        for session_id in lengths:
            verifier.accept(CloseTask(session_id))
    return {
        "num_sessions": num_sessions,
        "num_context_tokens": num_tokens,
        "num_steps": num_steps,
        "median_ms": round(statistics.median(times_ms), 3),
        "p99_ms": round(float(np.percentile(times_ms, 99)), 3),
    }


def _round(verifier: Verifier, lengths: dict[int, int], tree: TokenTree, now_ns: Callable[[], int]) -> float:
    """A verdict for each; milliseconds from taking the trees up to the last verdict."""
    started_ns = now_ns()
    tasks = {session_id: VerifyTask(session_id, length, tree) for session_id, length in lengths.items()}
    for task in tasks.values():
        verifier.accept(task)
    while not all(task.future.done() for task in tasks.values()):
        verifier.step()
    elapsed_ms = (now_ns() - started_ns) / 1e6
    for session_id, task in tasks.items():
        verdict, _ = task.future.result()
        lengths[session_id] += len(verdict.token_ids)
    return elapsed_ms


def measure(settings: BookkeepingSettings, console: Console) -> Findings:
    """Prompts of three lengths, then steps of few and of many sessions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A layer that sees few positions: reading would take minutes otherwise.
        write_config(folder, _SHAPE, "float32", _MAX_LEN, model_type="mistral", sliding_window=_WINDOW)
        reading = [time_reading(folder, num_tokens) for num_tokens in (32_768, 65_536, 131_072)]
        steps = [
            time_steps(folder, num_sessions, num_tokens, settings.steps)
            for num_sessions, num_tokens in ((1, 256), (64, 256), (64, 32_768), (250, 256), (1000, 256))
        ]
    return Findings(
        {"reading": reading, "steps": steps},
        [ResultTable("Python of reading a prompt", _READING, reading), ResultTable("Python of a step", _STEPS, steps)],
    )


BENCHMARK = Benchmark("python -m bench bookkeeping", __doc__, BookkeepingSettings, measure)
