"""`easyspec bench prefill`: how long the first token takes behind long prompts, beside other servers.

The same prompts by easyspec's services and by each server, in turns, one token of each. Every prompt is new to all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

from rich.console import Console

from bench.alternatives.alternatives import Alternative, EasyspecServices
from bench.alternatives.servers import ServerGeneration
from bench.alternatives.summary import OURS
from bench.alternatives.timed_completion import Maker
from bench.harness.benchmark import Benchmark, Findings
from bench.harness.clients import GatewayClient
from bench.harness.flags import flag
from bench.harness.pairs import EXECUTOR, PAIR, PAIRS, executor_flags, start_services
from bench.harness.provenance import provenance_lines
from bench.harness.streams import Speculation, Task
from bench.harness.tables import Column, ResultTable, Row, markdown_table
from bench.harness.turns import one_by_one, progress_on, rotated
from easyspec.checkpoint.tokenizer_files import load_tokenizer
from easyspec.errors import ConfigurationError
from models.heldout import held_out_texts

_TIMEOUT_S = 600.0
COLUMNS = (
    Column("by", lambda row: f"{row['program']}, {row['way']}"),
    Column("prompt tokens", "prompt_tokens"),
    Column("first token ms", "first_token_ms", ".1f"),
    Column("prompt tokens/s", "tokens_per_s", ".0f"),
    Column("x best other", "vs_best_other", ".2f"),
)


@dataclass(frozen=True)
class PrefillSettings:
    QUICK: ClassVar = {"num_prompts": 2, "prompt_tokens": (256,)}

    pair: Annotated[str, PAIR] = "bundled"
    executor: Annotated[str, EXECUTOR] = "auto"
    servers: Annotated[
        tuple[str, ...],
        flag(
            "A running server of the same weights: see `easyspec bench alternatives`.", "--server", metavar="NAME=URL"
        ),
    ] = ()
    prompt_tokens: Annotated[tuple[int, ...], flag("One or several.")] = (512,)
    num_prompts: Annotated[int, flag("Prompts of each length.", minimum=1)] = 8


@dataclass(frozen=True)
class FirstToken:
    """Who said it, after a prompt of so many tokens, and after how long."""

    maker: Maker
    prompt_tokens: int
    prompt_index: int
    elapsed_s: float


async def measure(settings: PrefillSettings, console: Console) -> Findings:
    """Start the services and ask for one token behind every prompt."""
    pair = PAIRS[settings.pair]
    pair.check()
    encode = partial(load_tokenizer(pair.base).encode, add_special_tokens=False)
    others = [ServerGeneration.named(server, encode, _TIMEOUT_S) for server in settings.servers]
    # One more of each length, which warms everything up.
    prompts = [(length, long_prompts(pair.base, length, settings.num_prompts + 1)) for length in settings.prompt_tokens]
    services = start_services(pair, executor_flags(settings.executor))
    async with services as stack, GatewayClient(stack.gateway_address, _TIMEOUT_S) as client:
        makers: list[Alternative] = [EasyspecServices(Maker(OURS), client, Speculation.OFF), *others]
        planned = [
            (maker, length, index, texts[index])
            for length, texts in prompts
            for index in range(len(texts))
            for maker in rotated(makers, index)
        ]
        with progress_on(console) as progress:
            first_tokens = await one_by_one(
                planned, lambda each: f"{each[1]} tokens, {each[0].maker}", _first_token, progress
            )
    rows = summarize_prefill([each for each in first_tokens if each.prompt_index])
    title = f"{pair.name}: from asking to the first token of answers to new prompts; medians over prompts"
    return Findings(
        content={"pair": pair.name, "results": rows},
        tables=[ResultTable(title, COLUMNS, rows)],
        checkpoints=pair.checkpoints,
    )


def long_prompts(model: Path, num_tokens: int, num_prompts: int) -> list[str]:
    """Texts of about so many tokens of the model's, none beginning as another does; raises ConfigurationError if there
    is less text."""
    tokenizer = load_tokenizer(model)
    token_ids: list[int] = tokenizer.encode("\n".join(held_out_texts().values()), add_special_tokens=False)
    if len(token_ids) < num_tokens * num_prompts:
        raise ConfigurationError(f"{num_prompts} prompts of {num_tokens} tokens; allowed: {len(token_ids)} in all")
    starts = range(0, num_tokens * num_prompts, num_tokens)
    return [tokenizer.decode(token_ids[start : start + num_tokens]) for start in starts]


async def _first_token(each: tuple[Alternative, int, int, str]) -> FirstToken:
    alternative, length, index, prompt = each
    task = Task(prompt, max_tokens=1, temperature=0.0, seed=1, speculation=Speculation.OFF)
    started_s = time.perf_counter()
    await alternative.complete(task)
    return FirstToken(alternative.maker, length, index, time.perf_counter() - started_s)


def summarize_prefill(first_tokens: Sequence[FirstToken]) -> list[Row]:
    """One row for everyone and every length, in the order in which they came: medians over prompts. `vs_best_other` is
    the median of ratios to the fastest other at each prompt."""
    found: dict[tuple[Maker, int], dict[int, float]] = {}
    for each in sorted(first_tokens, key=lambda each: (each.prompt_tokens, each.maker.program != OURS)):
        found.setdefault((each.maker, each.prompt_tokens), {})[each.prompt_index] = each.elapsed_s
    return [
        {
            "program": maker.program,
            "way": maker.way,
            "prompt_tokens": length,
            "first_token_ms": 1e3 * statistics.median(times.values()),
            "tokens_per_s": length / statistics.median(times.values()),
            "vs_best_other": _vs_best(
                times, [own for (who, n), own in found.items() if n == length and who.program != OURS]
            ),
        }
        for (maker, length), times in found.items()
    ]


def _vs_best(times: Mapping[int, float], others: Sequence[Mapping[int, float]]) -> float | None:
    if not others:
        return None
    return statistics.median(min(other[index] for other in others) / elapsed_s for index, elapsed_s in times.items())


def prefill_section(name: str, report: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            f"## The first token behind long prompts, the {report['pair']} pair ({name})\n",
            "From asking to the first token, each prompt new to everyone, medians over prompts. *x best other* is the",
            "median of ratios to the fastest server at each prompt: 2.00 is half of its time.\n",
            *provenance_lines(report),
            f"* {report['settings']['num_prompts']} prompts of each length\n",
            prefill_headline(report) + "\n",
        ]
    )


def prefill_headline(report: Mapping[str, Any]) -> str:
    return markdown_table(COLUMNS, report["results"])


BENCHMARK = Benchmark("easyspec bench prefill", __doc__, PrefillSettings, measure)
