"""What the real pair is measured with: questions of six kinds, written for this purpose and never trained on."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

_FILE = Path(__file__).with_name("evaluation_prompts.json")
EVALUATION_KINDS = ("chat", "explanation", "code", "rewriting", "extraction", "summarising")


@functools.cache
def evaluation_prompts() -> Mapping[str, Sequence[str]]:
    """What a user says, by kind."""
    content: dict[str, list[str]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return content


def chosen_prompts(kind: str, num_prompts: int, seed: int) -> list[str]:
    """`num_prompts` of a kind, in an order that follows from the seed; raises ValueError if there are fewer."""
    prompts = evaluation_prompts()[kind]
    if num_prompts > len(prompts):
        raise ValueError(f"num_prompts must be at most {len(prompts)} for {kind}, not {num_prompts}")
    return random.Random(seed).sample(list(prompts), num_prompts)
