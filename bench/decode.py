"""`easyspec bench decode`: plain, sequential and layer-parallel drafting, interleaved on held-out prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.clients import GatewayClient, ServedModels, Task
from bench.measurement import Mode, Sample, select_modes
from bench.pairs import PAIR_HELP, PAIRS, ModelPair, start_services
from bench.provenance import provenance
from bench.summary import Result, summarize
from bench.tables import print_results
from easyspec.cli.signals import run_until_signal
from easyspec.errors import ConfigurationError
from easyspec.speculation.parameters import TreeBudget

_WARM_UP_TOKENS = 24


@dataclass(frozen=True)
class DecodeSettings:
    """One run; `budget` None takes the gateway's default. Prompts and seeds follow from `seed`."""

    modes: tuple[Mode, ...]
    temperatures: tuple[float, ...]
    num_prompts: int
    max_tokens: int
    max_prompt_chars: int
    seed: int
    budget: TreeBudget | None


def main(argv: list[str]) -> int:
    """Run the benchmark; returns 0, or 1 if a completion differed from plain decoding's, or 128 + a signal's number.

    Raises EasyspecError if the services do not come up or fail.
    """
    arguments = _parser().parse_args(argv)
    settings = _settings(arguments)
    pair = PAIRS[arguments.pair]
    console = Console()
    measured: list[tuple[ServedModels, list[Sample]]] = []

    async def run() -> None:
        measured.append(await _measure(pair, settings, console))

    interrupted = run_until_signal(run())
    if interrupted:
        return interrupted
    models, samples = measured[0]
    results = summarize(samples)
    print_results([dataclasses.asdict(result) for result in results], console)
    if arguments.json is not None:
        command = shlex.join(["easyspec", "bench", "decode", *argv])
        write_report(arguments.json, report(command, pair, settings, models, results))
        console.print(f"written to {arguments.json}")
    num_failures = sum(result.num_drafter_failures for result in results)
    if num_failures:
        console.print(f"{num_failures} drafts failed or came late; their rounds were plain, so the figures mislead")
    num_differing = sum(result.num_differing_completions for result in results)
    console.print(f"{num_differing} of {len(samples)} completions differ from plain decoding (expected 0)")
    return 1 if num_differing else 0


def report(
    command: str,
    pair: ModelPair,
    settings: DecodeSettings,
    models: ServedModels,
    results: Sequence[Result],
) -> dict[str, Any]:
    """The run as plain JSON values; `bench/report.py` renders it."""
    budget = settings.budget or models.default_budget
    return {
        "command": command,
        **provenance(pair.checkpoints),
        "pair": {"name": pair.name, "base": models.base, "draft": models.draft},
        "settings": {
            "num_prompts": settings.num_prompts,
            "max_tokens": settings.max_tokens,
            "max_prompt_chars": settings.max_prompt_chars,
            "seed": settings.seed,
            "budget": dataclasses.asdict(budget),
        },
        "results": [dataclasses.asdict(result) for result in results],
    }


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def interleaved_tasks(prompts: Sequence[str], settings: DecodeSettings) -> Iterator[Task]:
    """Every prompt in every mode before the next prompt; the order of modes rotates from prompt to prompt.

    So whatever slows the machine down for a while slows all modes alike.
    """
    for index, prompt in enumerate(prompts):
        shift = index % len(settings.modes)
        for temperature in settings.temperatures:
            for mode in (*settings.modes[shift:], *settings.modes[:shift]):
                seed = settings.seed + index
                yield Task(index, prompt, mode, temperature, seed, settings.max_tokens, settings.budget)


async def measure(
    client: GatewayClient, prompts: Sequence[str], settings: DecodeSettings, progress: Progress
) -> list[Sample]:
    """Complete every prompt in every mode, one request at a time, after a short unmeasured one per mode."""
    warm_up = dataclasses.replace(settings, max_tokens=_WARM_UP_TOKENS)
    tasks = list(interleaved_tasks(prompts, settings))
    bar = progress.add_task("warming up", total=len(settings.modes) + len(tasks))
    for task in interleaved_tasks(prompts[:1], dataclasses.replace(warm_up, temperatures=settings.temperatures[:1])):
        await client.complete(task)
        progress.advance(bar)
    samples = []
    for task in tasks:
        progress.update(bar, description=f"prompt {task.prompt_index + 1}, T = {task.temperature}, {task.mode.name}")
        samples.append(await client.complete(task))
        progress.advance(bar)
    return samples


async def _measure(pair: ModelPair, settings: DecodeSettings, console: Console) -> tuple[ServedModels, list[Sample]]:
    pair.check()
    try:
        prompts = pair.prompts.some(settings.num_prompts, settings.seed, settings.max_prompt_chars)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    async with start_services(pair) as address, GatewayClient(address, timeout_s=600.0) as client:
        models = await client.models()
        console.print(f"base:  {models.base}\ndraft: {models.draft}")
        with Progress(console=console) as progress:
            return models, await measure(client, prompts, settings, progress)


def _settings(arguments: argparse.Namespace) -> DecodeSettings:
    default_modes = ["sequential", "n4-*"] if arguments.quick else ["*"]
    default_prompts, default_tokens = (3, 48) if arguments.quick else (8, 96)
    return DecodeSettings(
        modes=arguments.modes or select_modes(default_modes),
        temperatures=tuple(arguments.temperature or (0.0, 0.8)),
        num_prompts=arguments.num_prompts or default_prompts,
        max_tokens=arguments.max_tokens or default_tokens,
        max_prompt_chars=arguments.max_prompt_chars,
        seed=arguments.seed,
        budget=TreeBudget(*arguments.budget) if arguments.budget else None,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyspec bench decode", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write results to FILE")
    add("--pair", choices=sorted(PAIRS), default="bundled", help=PAIR_HELP)
    add("--quick", action="store_true", help="few prompts and modes: does it run, roughly how fast")
    add("--temperature", type=float, action="append", metavar="T", help="may be repeated (default: 0 and 0.8)")
    add("--num-prompts", type=_positive, metavar="N", help="held-out prompts (default: 8, quick 3)")
    add("--max-tokens", type=_positive, metavar="N", help="tokens per completion (default: 96, quick 48)")
    add("--max-prompt-chars", type=_positive, default=600, metavar="N", help="longest prompt (default: 600)")
    add(
        "--modes",
        type=_modes,
        metavar="PATTERNS",
        help="mode names or shell patterns, say 'sequential,n4-*' (default: all)",
    )
    add("--seed", type=int, default=7, metavar="N", help="chooses prompts and noise (default: 7)")
    add("--budget", type=_positive, nargs=3, metavar=("LEVELS", "WIDTH", "NODES"), help="tree (default: gateway's)")
    return parser


def _modes(text: str) -> tuple[Mode, ...]:
    try:
        return select_modes(text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
