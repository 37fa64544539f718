"""`easyspec bench alternatives`: the same prompts by easyspec and by what one would otherwise pick, in turns.

transformers' plain decoding, its assisted generation with the same draft model, and its prompt lookup run inside this
process, without a wire. Servers named by --server run beside it: llama.cpp's, vLLM's or any other with OpenAI's
completions. easyspec runs as it is delivered: three services behind gRPC.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Protocol

from rich.console import Console
from rich.progress import Progress

from bench.alternatives.servers import ServerGeneration
from bench.alternatives.summary import COLUMNS, OURS, summarize_alternatives
from bench.alternatives.timed_completion import Answer, DecodePhase, Maker, TimedCompletion
from bench.alternatives.transformers import TransformersGeneration
from bench.harness.benchmark import Benchmark, Findings
from bench.harness.clients import GatewayClient
from bench.harness.flags import flag
from bench.harness.pairs import EXECUTOR, PAIR, PAIRS, executor_flags, start_services
from bench.harness.prompts import HELD_OUT_TEXT, PairPrompts, prompts_in_turn
from bench.harness.streams import Speculation, Task
from bench.harness.tables import ResultTable
from bench.harness.turns import one_by_one, progress_on, rotated
from easyspec.checkpoint.tokenizer_files import load_tokenizer

_WARM_UP_TOKENS = 16
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class AlternativesSettings:
    QUICK: ClassVar = {"num_prompts": 2, "max_tokens": 48}

    pair: Annotated[str, PAIR] = "bundled"
    executor: Annotated[str, EXECUTOR] = "auto"
    servers: Annotated[
        tuple[str, ...],
        flag(
            "A running server of the same weights, its prompt cache off; one or several. NAME may be PROGRAM/WAY; a "
            "URL that ends in /completion is llama.cpp's, any other is the base URL of an OpenAI API.",
            "--server",
            metavar="NAME=URL",
        ),
    ] = ()
    no_transformers: Annotated[bool, flag("Leave transformers' own generation out.")] = False
    temperatures: Annotated[tuple[float, ...], flag("One or several.", "--temperature")] = (0.0, 0.8)
    num_prompts: Annotated[int, flag("Prompts of each kind.", minimum=1)] = 8
    max_tokens: Annotated[int, flag("Tokens per completion.", minimum=1)] = 128
    seed: Annotated[int, flag("Chooses prompts and noise.")] = 7


class Alternative(Protocol):
    """A way to complete a prompt."""

    maker: Maker

    async def complete(self, task: Task) -> Answer:
        """Return exactly `task.max_tokens` new tokens; raises EasyspecError."""
        ...


@dataclass(frozen=True)
class Planned:
    maker: Maker
    kind: str
    prompt_index: int
    task: Task


class EasyspecServices:
    """The running services, asked as any client asks them."""

    def __init__(self, maker: Maker, client: GatewayClient, speculation: Speculation) -> None:
        self.maker = maker
        self._client = client
        self._speculation = speculation

    async def complete(self, task: Task) -> Answer:
        stream = await self._client.complete(dataclasses.replace(task, speculation=self._speculation))
        arrivals = [(each.at_s, each.num_tokens) for each in stream.rounds if each.num_tokens]
        return Answer(tuple(stream.token_ids), len(stream.token_ids), DecodePhase.of_arrivals(arrivals))


def both_ways(client: GatewayClient) -> list[EasyspecServices]:
    return [
        EasyspecServices(Maker(OURS, "speculating"), client, Speculation.AUTO),
        EasyspecServices(Maker(OURS), client, Speculation.OFF),
    ]


async def measure(settings: AlternativesSettings, console: Console) -> Findings:
    """Start the services and ask everything in turns; fails if speculation changed what easyspec says."""
    import transformers

    pair = PAIRS[settings.pair]
    pair.check()
    others: list[Alternative] = []
    if not settings.no_transformers:
        others += await asyncio.to_thread(TransformersGeneration.all_ways, pair.base, pair.draft)
    encode = partial(load_tokenizer(pair.base).encode, add_special_tokens=False)
    others += [ServerGeneration.named(server, encode, _TIMEOUT_S) for server in settings.servers]
    services = start_services(pair, executor_flags(settings.executor))
    async with services as stack, GatewayClient(stack.gateway_address, _TIMEOUT_S) as client:
        with progress_on(console) as progress:
            completions = await complete_all([*others, *both_ways(client)], settings, progress, pair.prompts)
    rows = summarize_alternatives(completions)
    ours = [row for row in rows if row["program"] == OURS]
    num_differing = sum(row["num_completions"] - (row["num_as_plain"] or 0) for row in ours)
    title = "tokens/s of whole completions, reading the prompt included, and of decoding alone; medians over prompts"
    return Findings(
        content={
            "pair": pair.name,
            "transformers": None if settings.no_transformers else transformers.__version__,
            "servers": [server.partition("=")[0] for server in settings.servers],
            "results": rows,
        },
        tables=[ResultTable(title, COLUMNS, rows)],
        notes=[f"{num_differing} completions of easyspec differ from its plain decoding (expected 0)"],
        checkpoints=pair.checkpoints,
        exit_code=1 if num_differing else 0,
    )


def interleaved(
    makers: Sequence[Maker], settings: AlternativesSettings, source: PairPrompts = HELD_OUT_TEXT
) -> Iterator[Planned]:
    """Every prompt by every maker before the next prompt; which maker is first rotates. Raises ConfigurationError if
    there are too few prompts."""
    num_kinds = len(source.kinds)
    for number, (kind, prompt) in enumerate(prompts_in_turn(source, settings.num_prompts, settings.seed)):
        index = number // num_kinds
        for temperature in settings.temperatures:
            task = Task(prompt, settings.max_tokens, temperature, settings.seed + index, Speculation.OFF)
            for maker in rotated(makers, index):
                yield Planned(maker, kind, index, task)


async def complete_all(
    alternatives: Sequence[Alternative],
    settings: AlternativesSettings,
    progress: Progress,
    source: PairPrompts = HELD_OUT_TEXT,
) -> list[TimedCompletion]:
    """Complete every prompt by every alternative, one at a time, after a short unmeasured one by each."""
    by_maker = {alternative.maker: alternative for alternative in alternatives}
    planned = list(interleaved(list(by_maker), settings, source))
    for each in planned[: len(by_maker) * len(settings.temperatures)]:
        await by_maker[each.maker].complete(dataclasses.replace(each.task, max_tokens=_WARM_UP_TOKENS))

    async def complete(each: Planned) -> TimedCompletion:
        started_s = time.perf_counter()
        answer = await by_maker[each.maker].complete(each.task)
        elapsed_s = time.perf_counter() - started_s
        return TimedCompletion(each.maker, each.kind, each.task.temperature, each.prompt_index, answer, elapsed_s)

    return await one_by_one(
        planned, lambda each: f"{each.kind}, T = {each.task.temperature:g}, {each.maker}", complete, progress
    )


BENCHMARK = Benchmark("easyspec bench alternatives", __doc__, AlternativesSettings, measure)
