"""What clients of a load test ask for: prompts and lengths, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.harness.prompts import HELD_OUT_TEXT, PairPrompts
from bench.harness.streams import Speculation, Task
from models.heldout import held_out_prompts

_SHARED_PREFIX_CHARS = 1500
_SHARED_TAIL_CHARS = 200


@dataclass(frozen=True)
class LengthClass:
    """A share of the requests: prompts of at most `max_prompt_chars`, outputs of `min_tokens` to `max_tokens`."""

    weight: float
    max_prompt_chars: int
    min_tokens: int
    max_tokens: int


MIXES: dict[str, tuple[LengthClass, ...]] = {
    "mixed": (LengthClass(0.6, 250, 32, 96), LengthClass(0.3, 800, 32, 128), LengthClass(0.1, 2500, 16, 64)),
    "short": (LengthClass(1.0, 200, 32, 64),),
    "tiny": (LengthClass(1.0, 100, 16, 32),),
    "answers": (LengthClass(1.0, 100, 192, 256),),
    "shared-prefix": (LengthClass(1.0, _SHARED_TAIL_CHARS, 32, 96),),
}


class Workload:
    """An endless list of tasks: task `index` is the same in every run with the same mix and seed.

    In the shared-prefix mix all prompts begin with the same long text, as a system prompt would make them.
    Half of the tasks are greedy, half have temperature 0.8.
    """

    def __init__(self, mix: str, seed: int, source: PairPrompts = HELD_OUT_TEXT) -> None:
        self._classes = MIXES[mix]
        self._seed = seed
        self._prompts: dict[int, Sequence[str]] = {
            length.max_prompt_chars: source.pool(seed, length.max_prompt_chars) for length in self._classes
        }
        is_shared = mix == "shared-prefix"
        self._prefix = held_out_prompts(1, seed + 1, _SHARED_PREFIX_CHARS)[0] + "\n\n" if is_shared else ""

    def task(self, index: int, speculation: Speculation) -> Task:
        """The task at `index`; `speculation` changes nothing else about it."""
        chooser = random.Random(self._seed * 1_000_003 + index)
        weights = [length.weight for length in self._classes]
        length = chooser.choices(self._classes, weights)[0]
        return Task(
            prompt=self._prefix + chooser.choice(self._prompts[length.max_prompt_chars]),
            max_tokens=chooser.randint(length.min_tokens, length.max_tokens),
            temperature=chooser.choice((0.0, 0.8)),
            seed=chooser.getrandbits(32),
            speculation=speculation,
        )
