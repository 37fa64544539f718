"""Run a benchmark by its name: `python -m bench NAME`, and `easyspec bench NAME`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from easyspec.errors import ConfigurationError, EasyspecError, InvalidRequestError

if TYPE_CHECKING:
    from bench.harness.benchmark import Benchmark

# Where each is, and what it says. They are imported when they run: some need torch and transformers.
COMMANDS = {
    "model": ("bench.alternatives.model", "any MODEL, plain and speculating; the name can be left out"),
    "decode": ("bench.decode.decode", "one stream: plain, sequential and layer-parallel drafting"),
    "ahead": ("bench.decode.ahead", "one stream: drafting ahead of verdicts, or taking turns"),
    "serve": ("bench.serving.serve", "many streams at once: speculation off, on and auto"),
    "targets": ("bench.serving.targets", "two base models at once, one drafter"),
    "sources": ("bench.sources.sources", "every source of guesses, alone and fused, at equal node budgets"),
    "who-drafts": ("bench.sources.who_drafts", "which sources to ask in a round, on a made-up clock"),
    "alternatives": ("bench.alternatives.alternatives", "beside transformers' own generation and other servers"),
    "prefill": ("bench.alternatives.prefill", "the first token behind long prompts, beside other servers"),
    "chaos": ("bench.chaos.chaos", "kill, stop and cut off services under load, and compare every answer"),
    "soak": ("bench.chaos.soak", "an hour of clients that come, go and give up: nothing may grow"),
    "ranks": ("bench.ranks.ranks", "the planner's estimates beside rounds of real ranks"),
    "rank-memory": ("bench.ranks.rank_memory", "memory of each rank while a model loads"),
    "kernels": ("bench.kernels.kernels", "passes of the native executor"),
    "gpu": ("bench.kernels.gpu", "passes of large models of random weights on one GPU"),
    "acceptance": ("bench.probes.acceptance", "how much of a base's answers a draft model guesses"),
    "layer-groups": ("bench.probes.layer_groups", "fuzzy steps of drafts of many shapes beside exact ones"),
    "bookkeeping": ("bench.probes.bookkeeping", "what the verifier's Python takes beside its passes"),
    "first-answer": ("bench.probes.first_answer", "from the start of `easyspec chat` to its answer"),
    "report": ("bench.report.report", "write docs/benchmarks.md and its pages from the result files"),
}


def run(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` begin with, or measure the model that they do; without any, list the commands.
    Raises EasyspecError."""
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h"):
        print("Usage: easyspec bench MODEL [FLAGS] or NAME [FLAGS]; with --help, its flags.\n")
        for each, (_, about) in COMMANDS.items():
            print(f"  {each:<13} {about}")
        return 0
    flags = arguments[1:] if name in COMMANDS else arguments
    where, _ = COMMANDS.get(name, COMMANDS["model"])
    benchmark: Benchmark[object] = importlib.import_module(where).BENCHMARK
    return benchmark.main(flags)


def main(arguments: Sequence[str]) -> int:
    """As `run`, and a line on stderr for what is wrong: exit code 2 for bad input, 1 for a failure."""
    try:
        return run(arguments)
    except EasyspecError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError | InvalidRequestError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
