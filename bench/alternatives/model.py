"""`easyspec bench MODEL`: any model through the services, plain and speculating, on questions of six kinds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from rich.console import Console

from bench.alternatives.alternatives import AlternativesSettings, both_ways, complete_all
from bench.alternatives.summary import OURS
from bench.alternatives.timed_completion import Maker, TimedCompletion
from bench.chaos.limits import footprint
from bench.harness.benchmark import Benchmark, Findings
from bench.harness.clients import GatewayClient
from bench.harness.flags import flag
from bench.harness.pairs import EXECUTOR, ModelPair, executor_flags, start_services
from bench.harness.prompts import Questions
from bench.harness.tables import Column, ResultTable, Row
from bench.harness.turns import progress_on
from easyspec.checkpoint.location import weight_bytes
from easyspec.cli.clients import verifier_info
from easyspec.cli.models import choose_models
from easyspec.cli.up import say
from easyspec.errors import UnavailableError
from easyspec.model.config import load_config
from easyspec.ops.kv_pool import KVPool

_ALL = "all"
_MIB = 2**20
_COLUMNS = (
    Column("task", "task"),
    Column("T", "temperature", "g"),
    Column("plain tokens/s", "plain_tokens_per_s", ".1f"),
    Column("speculating", "tokens_per_s", ".1f"),
    Column("x plain", "vs_plain", ".2f"),
    Column("differ", lambda row: f"{row['num_differing']} of {row['num_completions']}"),
)


@dataclass(frozen=True)
class ModelSettings:
    QUICK: ClassVar = {"num_prompts": 1, "max_tokens": 48}

    model: Annotated[
        str, typer.Argument(help="Folder, GGUF file, hub id, or a name that `easyspec models` lists.", metavar="MODEL")
    ]
    draft: Annotated[str | None, flag("The draft model [default: as for `up`].", metavar="MODEL")] = None
    executor: Annotated[str, EXECUTOR] = "auto"
    temperatures: Annotated[tuple[float, ...], flag("One or several.", "--temperature")] = (0.0, 0.8)
    num_prompts: Annotated[int, flag("Questions of each kind.", minimum=1)] = 4
    max_tokens: Annotated[int, flag("Tokens per completion.", minimum=1)] = 128
    seed: Annotated[int, flag("Chooses questions and noise.")] = 7


async def measure(settings: ModelSettings, console: Console) -> Findings:
    """Start the services and ask in turns; fails if speculation changed what the model says."""
    choice = choose_models(settings.model, draft=settings.draft)
    if choice.note is not None:
        say(choice.note)
    pair = ModelPair(choice.base_name, choice.base, choice.draft, "easyspec models", Questions(choice.base))
    asked = AlternativesSettings(
        temperatures=settings.temperatures,
        num_prompts=settings.num_prompts,
        max_tokens=settings.max_tokens,
        seed=settings.seed,
    )
    services = start_services(pair, executor_flags(settings.executor))
    async with services as stack, GatewayClient(stack.gateway_address) as client:
        with progress_on(console) as progress:
            completions = await complete_all(both_ways(client), asked, progress, pair.prompts)
        kv = (await verifier_info(stack.verifier.address)).kv
        memory = verifier_memory(stack.verifier.pid, pair.base, kv.num_used_slots + kv.num_cached_slots)
    note = (
        f"memory of the verifier: {memory['resident_mib']:.0f} MiB of its own, {memory['rest_mib']:.0f} more than "
        f"weights ({memory['weights_mib']:.0f} MiB) and KV ({memory['kv_mib']:.0f} MiB)"
    )
    rows = summarize_model(completions)
    num_differing = sum(row["num_differing"] for row in rows if row["task"] == _ALL)
    title = f"{pair.name}: tokens/s of decoding, medians over prompts"
    return Findings(
        content={"model": pair.name, "verifier_memory": memory, "results": rows},
        tables=[ResultTable(title, _COLUMNS, rows)],
        notes=[note, f"{num_differing} completions differ from plain decoding (expected 0)"],
        checkpoints=pair.checkpoints,
        exit_code=1 if num_differing else 0,
    )


def summarize_model(completions: Sequence[TimedCompletion]) -> list[Row]:
    """One row per kind of task and temperature, and one of all tasks per temperature: decoding from the first message
    to the last. Speeds are medians over prompts, `vs_plain` the median of per-prompt ratios; `num_differing` counts
    completions that are not plain decoding's."""
    found: dict[tuple[str, float], dict[tuple[str, int], dict[Maker, TimedCompletion]]] = {}
    for one in completions:
        for task in (one.task_name, _ALL):
            prompts = found.setdefault((task, one.temperature), {})
            prompts.setdefault((one.task_name, one.prompt_index), {})[one.maker] = one
    rows: list[Row] = []
    for task, temperature in sorted(found, key=lambda key: (key[1], key[0] == _ALL)):
        by_prompt = found[task, temperature].values()
        plain = [by_maker[Maker(OURS)] for by_maker in by_prompt]
        drafted = [next(one for maker, one in by_maker.items() if maker != maker.plain) for by_maker in by_prompt]
        pairs = list(zip(drafted, plain, strict=True))
        rows.append(
            {
                "task": task,
                "temperature": temperature,
                "plain_tokens_per_s": statistics.median(map(_speed, plain)),
                "tokens_per_s": statistics.median(map(_speed, drafted)),
                "vs_plain": statistics.median(_speed(ours) / _speed(theirs) for ours, theirs in pairs),
                "num_differing": sum(ours.answer.content != theirs.answer.content for ours, theirs in pairs),
                "num_completions": len(by_prompt),
            }
        )
    return rows


def _speed(one: TimedCompletion) -> float:
    """Tokens a second of decoding; of the whole completion where all tokens came at once."""
    return one.decode_tokens_per_s or one.tokens_per_s


def verifier_memory(pid: int, model: Path, num_kv_tokens: int) -> dict[str, float]:
    """MiB of a process that serves `model` and has used so many slots of its KV pool: its own resident memory (pages of
    mapped files, which are shared, left out), the size of its weights' files, keys and values, and what is beside
    these: the interpreter, libraries, buffers. UnavailableError if it has gone."""
    found = footprint(pid)
    if found is None:
        raise UnavailableError("the verifier has ended")
    config = load_config(model)
    slot_bytes = KVPool.slot_bytes(config.num_layers, config.num_kv_heads, config.head_dim, config.dtype)
    resident, weights, kv = found.memory_mib, weight_bytes(model) / _MIB, num_kv_tokens * slot_bytes / _MIB
    return {"resident_mib": resident, "weights_mib": weights, "kv_mib": kv, "rest_mib": resident - weights - kv}


BENCHMARK = Benchmark("easyspec bench", __doc__, ModelSettings, measure)
