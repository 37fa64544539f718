"""Ways to decode one stream, and what a completion in one of them came to."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from bench.harness.streams import Counts, Round, Speculation, Stream, Task
from easyspec.errors import ConfigurationError
from easyspec.speculation.parameters import LayerPlanRequest, MlpPlacement, TreeBudget
from easyspec.speculation.sources import DraftSources

LAYER_PARALLEL_SIZES = (2, 3, 4, 6)


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
    """Return the modes whose name matches a shell pattern; plain always comes first.

    Raises ConfigurationError for a pattern that matches nothing.
    """
    names = [mode.name for mode in all_modes()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigurationError(f"{pattern!r} matches none of {', '.join(names)}")
    chosen = [mode for mode in all_modes() if any(fnmatch.fnmatch(mode.name, pattern) for pattern in patterns)]
    return (PLAIN, *(mode for mode in chosen if mode != PLAIN))


@dataclass(frozen=True)
class Sample:
    """One completion of one prompt in one mode; levels count from the first below the root."""

    mode: Mode
    temperature: float
    prompt_index: int
    token_ids: tuple[int, ...]
    rounds: tuple[Round, ...]
    counts: Counts
    time_to_first_token_s: float

    @classmethod
    def of_stream(cls, mode: Mode, stream: Stream) -> Self:
        """Of a completed stream, whose index is the prompt's."""
        return cls(
            mode=mode,
            temperature=stream.task.temperature,
            prompt_index=stream.index,
            token_ids=tuple(stream.token_ids),
            rounds=tuple(item for item in stream.rounds if item.num_tokens),
            counts=stream.counts,
            time_to_first_token_s=stream.time_to_first_token_s or 0.0,
        )

    @property
    def decode_rounds(self) -> tuple[Round, ...]:
        """All rounds but the first, in which the verifier reads the prompt."""
        return self.rounds[1:]

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
        num_tokens = sum(item.num_tokens for item in self.decode_rounds)
        return num_tokens / (self.rounds[-1].at_s - self.rounds[0].at_s)
