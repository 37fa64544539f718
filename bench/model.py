"""`easyspec bench MODEL`: any model through the services, plain and speculating, on questions of six kinds."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.alternatives import AlternativesSettings, both_ways, measure
from bench.alternatives_report import OURS
from bench.decode import write_report
from bench.pair_prompts import Questions
from bench.pairs import ModelPair, pair_stack
from bench.provenance import provenance
from bench.serving.clients import LoadClient
from bench.tables import Row, print_table
from bench.timed_completion import Maker, TimedCompletion
from bench.verifier_memory import VerifierMemory, verifier_memory
from easyspec.cli.clients import verifier_info
from easyspec.cli.models import choose_models
from easyspec.cli.signals import run_until_signal
from easyspec.cli.up import say

_TIMEOUT_S = 600.0
_ALL = "all"
COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("task", lambda row: row["task"]),
    ("T", lambda row: f"{row['temperature']:g}"),
    ("plain tokens/s", lambda row: f"{row['plain_tokens_per_s']:.1f}"),
    ("speculating", lambda row: f"{row['tokens_per_s']:.1f}"),
    ("x plain", lambda row: f"{row['vs_plain']:.2f}"),
    ("differ", lambda row: f"{row['num_differing']} of {row['num_completions']}"),
)


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """One row: decoding from the first message to the last. Speeds are medians over prompts, `vs_plain` the median of
    per-prompt ratios; `num_differing` counts completions that are not plain decoding's."""

    task: str
    temperature: float
    plain_tokens_per_s: float
    tokens_per_s: float
    vs_plain: float
    num_differing: int
    num_completions: int


def main(argv: list[str]) -> int:
    """Run the benchmark; returns 0, or 1 if speculation changed what the model says, or 128 + a signal's number.

    Raises EasyspecError if a model is refused, or if the services do not come up or fail.
    """
    arguments, console = _parser().parse_args(argv), Console()
    choice = choose_models(arguments.model, draft=arguments.draft)
    if choice.note is not None:
        say(choice.note)
    pair = ModelPair(choice.base_name, choice.base, choice.draft, "easyspec models", Questions(choice.base))
    settings = _settings(arguments)
    completions: list[TimedCompletion] = []
    memory: list[VerifierMemory] = []

    async def run() -> None:
        async with pair_stack(pair) as stack, LoadClient(stack.gateway_address, _TIMEOUT_S) as client:
            with Progress(console=console) as progress:
                completions.extend(await measure(both_ways(client), settings, progress, pair.prompts))
            kv = (await verifier_info(stack.verifier.address)).kv
            memory.append(verifier_memory(stack.verifier.pid, pair.base, kv.num_used_slots + kv.num_cached_slots))

    if interrupted := run_until_signal(run()):
        return interrupted
    results = summarize_model(completions)
    title = f"{pair.name}: tokens/s of decoding, medians over prompts"
    print_table(COLUMNS, [dataclasses.asdict(result) for result in results], title, console)
    if arguments.json is not None:
        command = shlex.join(["easyspec", "bench", *argv])
        write_report(arguments.json, _report(command, pair, settings, results, memory[0]))
        console.print(f"written to {arguments.json}")
    console.print(str(memory[0]))
    num_differing = sum(result.num_differing for result in results if result.task == _ALL)
    console.print(f"{num_differing} completions differ from plain decoding (expected 0)")
    return 1 if num_differing else 0


def summarize_model(completions: Sequence[TimedCompletion]) -> list[ModelResult]:
    """One row per kind of task and temperature, and one of all tasks per temperature."""
    found: dict[tuple[str, float], dict[tuple[str, int], dict[Maker, TimedCompletion]]] = {}
    for one in completions:
        for task in (one.task_name, _ALL):
            prompts = found.setdefault((task, one.temperature), {})
            prompts.setdefault((one.task_name, one.prompt_index), {})[one.maker] = one
    in_order = sorted(found, key=lambda key: (key[1], key[0] == _ALL))
    return [_result(task, temperature, list(found[task, temperature].values())) for task, temperature in in_order]


def _result(task: str, temperature: float, prompts: Sequence[Mapping[Maker, TimedCompletion]]) -> ModelResult:
    plain = [by_maker[Maker(OURS)] for by_maker in prompts]
    drafted = [next(one for maker, one in by_maker.items() if maker != maker.plain) for by_maker in prompts]
    return ModelResult(
        task=task,
        temperature=temperature,
        plain_tokens_per_s=statistics.median(map(_speed, plain)),
        tokens_per_s=statistics.median(map(_speed, drafted)),
        vs_plain=statistics.median(_speed(ours) / _speed(theirs) for ours, theirs in zip(drafted, plain, strict=True)),
        num_differing=sum(a.answer.content != b.answer.content for a, b in zip(drafted, plain, strict=True)),
        num_completions=len(prompts),
    )


def _speed(one: TimedCompletion) -> float:
    """Tokens a second of decoding; of the whole completion where all tokens came at once."""
    return one.decode_tokens_per_s or one.tokens_per_s


def _report(
    command: str,
    pair: ModelPair,
    settings: AlternativesSettings,
    results: Sequence[ModelResult],
    memory: VerifierMemory,
) -> dict[str, Any]:
    return {
        "command": command,
        **provenance(pair.checkpoints),
        "model": pair.name,
        "settings": dataclasses.asdict(settings),
        "verifier_memory": {**dataclasses.asdict(memory), "rest_mib": memory.rest_mib},
        "results": [dataclasses.asdict(result) for result in results],
    }


def _settings(arguments: argparse.Namespace) -> AlternativesSettings:
    return AlternativesSettings(
        temperatures=tuple(arguments.temperature or (0.0, 0.8)),
        num_prompts=arguments.num_prompts or (1 if arguments.quick else 4),
        max_tokens=arguments.max_tokens or (48 if arguments.quick else 128),
        seed=arguments.seed,
        has_transformers=False,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyspec bench", description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, GGUF file, hub id, or a name that `easyspec models` lists")
    add("--draft", metavar="MODEL", help="the draft model (default: as for `up`)")
    add("--json", type=Path, metavar="FILE", help="write results to FILE")
    add("--quick", action="store_true", help="few prompts and tokens: does it run, roughly how fast")
    add("--temperature", type=float, action="append", metavar="T", help="may be repeated (default: 0 and 0.8)")
    add("--num-prompts", type=int, metavar="N", help="questions of each kind (default: 4, quick 1)")
    add("--max-tokens", type=int, metavar="N", help="tokens per completion (default: 128, quick 48)")
    add("--seed", type=int, default=7, metavar="N", help="chooses questions and noise (default: 7)")
    return parser


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
