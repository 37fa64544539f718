"""The choice rule in C++ against the specification, over vocabularies of one block and of many."""

from __future__ import annotations

import random

import pytest
import torch

from easyspec.ops.native import NativeExecutor
from easyspec.ops.reference import ReferenceExecutor
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sampling import ChoiceRow, TokenHistory
from tests.ops.small_model import PATHS


def drawn(draw: random.Random, vocab_size: int) -> tuple[SamplingParameters, TokenHistory]:
    sampling = SamplingParameters(
        seed=draw.randrange(1000),
        temperature=draw.choice([0.0, 0.3, 0.8, 2.0]),
        top_k=draw.choice([None, 1, 50, 2000]),
        top_p=draw.choice([1.0, 0.95, 0.5, 0.01]),
        min_p=draw.choice([0.0, 0.05, 0.5]),
        repetition_penalty=draw.choice([1.0, 1.1, 0.8]),
        presence_penalty=draw.choice([0.0, 0.5]),
        frequency_penalty=draw.choice([0.0, 0.2]),
    )
    prompt, output = ([draw.randrange(vocab_size) for _ in range(length)] for length in (30, 20))
    return sampling, TokenHistory(prompt, output)


@pytest.mark.skipif(not PATHS, reason="the library was not built")
@pytest.mark.parametrize("vocab_size", [1023, 1024, 1025, 5001])
def test_choices_are_those_of_the_specification(vocab_size: int) -> None:
    native, reference = NativeExecutor(1), ReferenceExecutor(torch.device("cpu"))
    draw = random.Random(vocab_size)
    for seed in range(40):
        logits = draw.choice([0.1, 1.0, 8.0]) * torch.randn(
            4, vocab_size, generator=torch.Generator().manual_seed(seed)
        )
        if seed % 5 == 0:  # ties
            logits = logits.round()
        sampling, history = drawn(draw, vocab_size)
        rows = [ChoiceRow(sampling, 50 + row, tuple(range(row)), history) for row in range(4)]
        chosen = [executor.choose_tokens(logits.clone(), rows) for executor in (native, reference)]
        assert list(chosen[0]) == list(chosen[1]), sampling
