"""`easyspec bench alternatives`: the same prompts by easyspec and by what one would otherwise pick, in turns.

transformers' plain decoding, its assisted generation with the same draft model, and its prompt lookup run inside this
process, without a wire. Servers named by --server run beside it: llama.cpp's, vLLM's or any other with OpenAI's
completions. easyspec runs as it is delivered: three services behind gRPC.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import shlex
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress

from bench.alternatives_report import OURS, AlternativeResult, print_alternatives, summarize_alternatives
from bench.decode import write_report
from bench.pair_prompts import HELD_OUT_TEXT, PairPrompts
from bench.pairs import PAIR_HELP, PAIRS, ModelPair, start_services
from bench.provenance import provenance
from bench.server_generation import ServerGeneration
from bench.serving.clients import LoadClient
from bench.serving.streams import Outcome, Stream
from bench.serving.workload import Speculation, Task
from bench.timed_completion import Answer, DecodePhase, Maker, TimedCompletion
from bench.transformers_generation import TransformersGeneration
from easyspec.checkpoint.tokenizer_files import load_tokenizer
from easyspec.cli.signals import run_until_signal
from easyspec.errors import ConfigurationError, UnavailableError

_WARM_UP_TOKENS = 16
_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True)
class AlternativesSettings:
    """One run; prompts and seeds follow from `seed`. `servers` are NAME=URL."""

    temperatures: tuple[float, ...]
    num_prompts: int
    max_tokens: int
    seed: int
    servers: tuple[str, ...] = ()
    has_transformers: bool = True


class Alternative(Protocol):
    """A way to complete a prompt."""

    maker: Maker

    async def complete(self, task: Task) -> Answer:
        """Return exactly `task.max_tokens` new tokens; raises EasyspecError."""
        ...


class EasyspecServices:
    """The running services, asked as any client asks them."""

    def __init__(self, maker: Maker, client: LoadClient, speculation: Speculation) -> None:
        self.maker = maker
        self._client = client
        self._speculation = speculation

    async def complete(self, task: Task) -> Answer:
        stream = Stream(dataclasses.replace(task, speculation=self._speculation), 0)
        await self._client.run(stream)
        if stream.outcome is not Outcome.COMPLETE:
            raise UnavailableError(f"the gateway did not complete a request: {stream.error}")
        arrivals = [(chunk.at_s, chunk.num_tokens) for chunk in stream.chunks if chunk.num_tokens]
        return Answer(tuple(stream.token_ids), len(stream.token_ids), DecodePhase.of_arrivals(arrivals))


def both_ways(client: LoadClient) -> list[EasyspecServices]:
    """The services speculating, and decoding plainly."""
    return [
        EasyspecServices(Maker(OURS, "speculating"), client, Speculation.AUTO),
        EasyspecServices(Maker(OURS), client, Speculation.OFF),
    ]


def main(argv: list[str]) -> int:
    """Run the benchmark; returns 0, or 1 if speculation changed what easyspec says, or 128 + a signal's number.

    Raises EasyspecError if the services do not come up or fail.
    """
    arguments = _parser().parse_args(argv)
    settings, pair, console = _settings(arguments), PAIRS[arguments.pair], Console()
    completions: list[TimedCompletion] = []

    async def run() -> None:
        completions.extend(await _measure(pair, settings, console))

    interrupted = run_until_signal(run())
    if interrupted:
        return interrupted
    results = summarize_alternatives(completions)
    print_alternatives(results, console)
    if arguments.json is not None:
        command = shlex.join(["easyspec", "bench", "alternatives", *argv])
        write_report(arguments.json, _report(command, pair, settings, results))
        console.print(f"written to {arguments.json}")
    num_differing = sum(
        result.num_completions - (result.num_as_plain or 0) for result in results if result.program == OURS
    )
    console.print(f"{num_differing} completions of easyspec differ from its plain decoding (expected 0)")
    return 1 if num_differing else 0


def interleaved(
    makers: Sequence[Maker], settings: AlternativesSettings, source: PairPrompts = HELD_OUT_TEXT
) -> Iterator[tuple[Maker, str, int, Task]]:
    """Yield (who, kind of task, prompt index, task): every prompt by everybody before the next prompt.

    Kinds take turns, and so does who is first. Raises ConfigurationError if there are too few prompts.
    """
    try:
        prompts = [source.of_kind(kind, settings.num_prompts, settings.seed) for kind in source.kinds]
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    for index, same_index in enumerate(zip(*prompts, strict=True)):
        shift = index % len(makers)
        for kind, prompt in zip(source.kinds, same_index, strict=True):
            for temperature in settings.temperatures:
                task = Task(prompt, settings.max_tokens, temperature, settings.seed + index, Speculation.OFF)
                for maker in (*makers[shift:], *makers[:shift]):
                    yield maker, kind, index, task


async def measure(
    alternatives: Sequence[Alternative],
    settings: AlternativesSettings,
    progress: Progress,
    source: PairPrompts = HELD_OUT_TEXT,
) -> list[TimedCompletion]:
    """Complete every prompt by every alternative, one at a time, after a short unmeasured one by each."""
    by_maker = {alternative.maker: alternative for alternative in alternatives}
    planned = list(interleaved(list(by_maker), settings, source))
    bar = progress.add_task("warming up", total=len(planned))
    for maker, _, _, task in planned[: len(by_maker) * len(settings.temperatures)]:
        await by_maker[maker].complete(dataclasses.replace(task, max_tokens=_WARM_UP_TOKENS))
    completions = []
    for maker, kind, index, task in planned:
        progress.update(bar, description=f"{kind}, T = {task.temperature:g}, {maker}")
        started_s = time.perf_counter()
        answer = await by_maker[maker].complete(task)
        elapsed_s = time.perf_counter() - started_s
        completions.append(TimedCompletion(maker, kind, task.temperature, index, answer, elapsed_s))
        progress.advance(bar)
    return completions


async def _measure(pair: ModelPair, settings: AlternativesSettings, console: Console) -> list[TimedCompletion]:
    pair.check()
    others: list[Alternative] = []
    if settings.has_transformers:
        others += await asyncio.to_thread(TransformersGeneration.all_ways, pair.base, pair.draft)
    encode = partial(load_tokenizer(pair.base).encode, add_special_tokens=False)
    others += [ServerGeneration.named(server, encode, _TIMEOUT_S) for server in settings.servers]
    async with start_services(pair) as address, LoadClient(address, _TIMEOUT_S) as client:
        with Progress(console=console) as progress:
            return await measure([*others, *both_ways(client)], settings, progress, pair.prompts)


def _report(
    command: str, pair: ModelPair, settings: AlternativesSettings, results: Sequence[AlternativeResult]
) -> dict[str, Any]:
    import transformers

    return {
        "command": command,
        **provenance(pair.checkpoints),
        "transformers": transformers.__version__ if settings.has_transformers else None,
        "servers": [server.partition("=")[0] for server in settings.servers],
        "pair": pair.name,
        "settings": dataclasses.asdict(settings),
        "results": [dataclasses.asdict(result) for result in results],
    }


def _settings(arguments: argparse.Namespace) -> AlternativesSettings:
    return AlternativesSettings(
        temperatures=tuple(arguments.temperature or (0.0, 0.8)),
        num_prompts=arguments.num_prompts or (2 if arguments.quick else 8),
        max_tokens=arguments.max_tokens or (48 if arguments.quick else 128),
        seed=arguments.seed,
        servers=tuple(arguments.server),
        has_transformers=not arguments.no_transformers,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="easyspec bench alternatives", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write results to FILE")
    add("--pair", choices=sorted(PAIRS), default="bundled", help=PAIR_HELP)
    add(
        "--server",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a running server of the same weights, its prompt cache off; may be repeated. NAME may be PROGRAM/WAY; "
        "a URL that ends in /completion is llama.cpp's, any other is the base URL of an OpenAI API",
    )
    add("--no-transformers", action="store_true", help="leave transformers' own generation out")
    add("--quick", action="store_true", help="few prompts and tokens: does it run, roughly how fast")
    add("--temperature", type=float, action="append", metavar="T", help="may be repeated (default: 0 and 0.8)")
    add("--num-prompts", type=int, metavar="N", help="prompts of each kind (default: 8, quick 2)")
    add("--max-tokens", type=int, metavar="N", help="tokens per completion (default: 128, quick 48)")
    add("--seed", type=int, default=7, metavar="N", help="chooses prompts and noise (default: 7)")
    return parser


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
