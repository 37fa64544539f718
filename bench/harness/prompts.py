"""What a pair of models is asked in a benchmark: text to go on with, or questions in the base model's chat template."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

from bench.harness.tasks import TASK_NAMES, source_prompts
from easyspec.errors import ConfigurationError
from gateway.text.conversation import ChatTurn, Conversation
from gateway.text.tokenizer import Tokenizer
from models.evaluation_prompts import EVALUATION_KINDS, chosen_prompts, evaluation_prompts
from models.heldout import held_out_prompts

_POOL_SIZE = 256


class HeldOutText:
    """Python's own source and documentation, for the pairs that were trained on the rest of it. Prompts follow from a
    seed; `kinds` are those of `of_kind`."""

    kinds: Sequence[str] = TASK_NAMES

    def of_kind(self, kind: str, num_prompts: int, seed: int) -> list[str]:
        """Prompts of one kind; raises ValueError if there are fewer."""
        return source_prompts(kind, num_prompts, seed)

    def some(self, num_prompts: int, seed: int, max_chars: int) -> list[str]:
        """Prompts of at most `max_chars` characters, a template's aside; raises ValueError if there are fewer."""
        return held_out_prompts(num_prompts, seed, max_chars)

    def pool(self, seed: int, max_chars: int) -> list[str]:
        """As many as a load test should draw from."""
        return held_out_prompts(_POOL_SIZE, seed, max_chars)


HELD_OUT_TEXT = HeldOutText()


class Questions:
    """The questions of `models/evaluation_prompts.json`, for an instruct model by its own template, likewise. A model
    without a template is asked the bare question."""

    kinds: Sequence[str] = EVALUATION_KINDS

    def __init__(self, model: Path) -> None:
        self._model = model

    def of_kind(self, kind: str, num_prompts: int, seed: int) -> list[str]:
        return [self._asked(question) for question in chosen_prompts(kind, num_prompts, seed)]

    def some(self, num_prompts: int, seed: int, max_chars: int) -> list[str]:
        prompts = self.pool(seed, max_chars)
        if num_prompts > len(prompts):
            raise ValueError(f"num_prompts must be at most {len(prompts)}, not {num_prompts}")
        return prompts[:num_prompts]

    def pool(self, seed: int, max_chars: int) -> list[str]:
        """All that fit, the kinds in turn."""
        chooser = random.Random(seed)
        by_kind = [chooser.sample(list(each), len(each)) for each in evaluation_prompts().values()]
        in_turn = chain.from_iterable(zip_longest(*by_kind))
        return [self._asked(question) for question in in_turn if question and len(question) <= max_chars]

    def _asked(self, question: str) -> str:
        if self._tokenizer.templates.find(has_tools=False) is None:
            return question
        return self._tokenizer.prompt_of(Conversation((ChatTurn("user", question),))).text

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self._model)


PairPrompts = HeldOutText | Questions


def prompts_in_turn(source: PairPrompts, num_prompts: int, seed: int) -> list[tuple[str, str]]:
    """Kind and text of so many prompts of every kind; raises ConfigurationError if there are fewer. The kinds take
    turns, so that what a drafter learns does not favour the last one."""
    try:
        by_kind = [source.of_kind(kind, num_prompts, seed) for kind in source.kinds]
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    return [
        (kind, prompt) for group in zip(*by_kind, strict=True) for kind, prompt in zip(source.kinds, group, strict=True)
    ]
