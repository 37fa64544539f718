"""Ways to decode one stream, and what a completion in one of them came to."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from rich.progress import Progress

from bench.harness.clients import GatewayClient
from bench.harness.streams import Counts, Round, Speculation, Stream, Task
from bench.harness.turns import one_by_one
from easyspec.errors import ConfigurationError
from easyspec.speculation.parameters import LayerPlanRequest, MlpPlacement, TreeBudget
from easyspec.speculation.sources import DraftSources

LAYER_PARALLEL_SIZES = (2, 3, 4, 6)
_WARM_UP_TOKENS = 24


@dataclass(frozen=True)
class Mode:
    """One way to decode; `layer_plan` is None for plain decoding, `sources` make the guesses."""

    name: str
    layer_plan: LayerPlanRequest | None = None
    sources: DraftSources = DraftSources.MODEL

    def task(
        self, prompt: str, max_tokens: int, temperature: float, seed: int, budget: TreeBudget | None = None
    ) -> Task:
        """A completion in this mode; `budget` None takes the gateway's default."""
        if self.layer_plan is None:
            return Task(prompt, max_tokens, temperature, seed, Speculation.OFF)
        plan, sources = self.layer_plan, self.sources
        return Task(prompt, max_tokens, temperature, seed, Speculation.ON, plan, sources, budget)


PLAIN = Mode("plain")
SEQUENTIAL = Mode("sequential", LayerPlanRequest(1, MlpPlacement.SEQUENTIAL))


def all_modes() -> tuple[Mode, ...]:
    """Plain, sequential drafting, then every layer-parallel plan with and without calibration."""
    plans = [
        LayerPlanRequest(size, mlp, calibration)
        for size in LAYER_PARALLEL_SIZES
        for mlp in MlpPlacement
        for calibration in (True, False)
    ]
    ending = {True: "", False: "-uncalibrated"}
    named = [f"n{plan.layer_parallel_size}-{plan.mlp.value}{ending[plan.calibration]}" for plan in plans if plan.mlp]
    return (PLAIN, SEQUENTIAL, *map(Mode, named, plans))


def select_modes(patterns: Sequence[str]) -> tuple[Mode, ...]:
    """Return the modes whose name matches a shell pattern; plain always comes first. Raises ConfigurationError for a
    pattern that matches nothing."""
    names = [mode.name for mode in all_modes()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigurationError(f"{pattern!r} matches none of {', '.join(names)}")
    chosen = [mode for mode in all_modes() if any(fnmatch.fnmatch(mode.name, pattern) for pattern in patterns)]
    return (PLAIN, *(mode for mode in chosen if mode != PLAIN))


@dataclass(frozen=True)
class Planned:
    """A completion to be measured; `kind` is the prompt's, where there are several."""

    mode: Mode
    prompt_index: int
    task: Task
    kind: str = ""


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt in one mode; levels count from the first below the root. `node_budget` is 0 where
    none was asked for."""

    mode: Mode
    temperature: float
    prompt_index: int
    token_ids: tuple[int, ...]
    rounds: tuple[Round, ...]
    counts: Counts
    time_to_first_token_s: float
    kind: str = ""
    node_budget: int = 0

    @classmethod
    def of_stream(cls, planned: Planned, stream: Stream) -> Self:
        return cls(
            mode=planned.mode,
            temperature=planned.task.temperature,
            prompt_index=planned.prompt_index,
            token_ids=tuple(stream.token_ids),
            rounds=tuple(item for item in stream.rounds if item.num_tokens),
            counts=stream.counts,
            time_to_first_token_s=stream.time_to_first_token_s or 0.0,
            kind=planned.kind,
            node_budget=planned.task.budget.num_nodes if planned.task.budget else 0,
        )

    @property
    def steady_rounds(self) -> tuple[Round, ...]:
        """All rounds but the first two: the second may wait until the drafter has read the prompt."""
        return self.rounds[2:]

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of the decode phase: tokens after the first round / time since it arrived.

        The first round of a drafted completion carries more than one token; counting those would give
        speculation tokens for free. None if the completion ended in its first round.
        """
        if len(self.rounds) < 2:
            return None
        num_tokens = sum(item.num_tokens for item in self.rounds[1:])
        return num_tokens / (self.rounds[-1].at_s - self.rounds[0].at_s)


async def complete_each(
    client: GatewayClient,
    planned: Sequence[Planned],
    num_warm_ups: int,
    say: Callable[[Planned], str],
    progress: Progress,
) -> list[Sample]:
    """One request at a time, after short unmeasured ones of the first `num_warm_ups`."""

    async def complete(each: Planned) -> Sample:
        return Sample.of_stream(each, await client.complete(each.task))

    for each in planned[:num_warm_ups]:
        await client.complete(dataclasses.replace(each.task, max_tokens=_WARM_UP_TOKENS))
    return await one_by_one(planned, say, complete, progress)
