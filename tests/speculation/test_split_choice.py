"""Choices over a split vocabulary are those over the whole one, ties included, for a few bytes a row."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from easyspec.parallel.shard import Shard
from easyspec.speculation.parameters import Grammar, GrammarKind, SamplingParameters
from easyspec.speculation.sampling import ChoiceRow, TokenHistory, choose_tokens
from easyspec.speculation.split_choice import NO_ROWS, can_split, choose_split, split_rows

HISTORY = TokenHistory((1, 2, 3))


class Exchange:
    """Gathers over threads that stand for ranks; counts what one of them sends."""

    def __init__(self, size: int) -> None:
        self.sent_bytes: list[int] = []
        self._parts: list[Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size)

    def gather_of(self, rank: int, part: Tensor) -> Tensor:
        self._parts[rank] = part
        if rank == 0:
            self.sent_bytes.append(part.nbytes)
        self._barrier.wait(20)
        gathered = torch.stack(self._parts)
        self._barrier.wait(20)
        return gathered


def choices_of_ranks(logits: Tensor, choice_rows: list[ChoiceRow], size: int) -> tuple[list[list[int]], list[int]]:
    """What every rank says of its part of `logits`, and the bytes that a rank sent in each gather."""
    exchange, vocab_size = Exchange(size), logits.shape[1]
    asked = split_rows([*range(len(choice_rows))], choice_rows)

    def on_rank(rank: int) -> list[int]:
        own = Shard(rank, size).vocabulary(vocab_size)
        part = logits[:, own.start : own.stop].clone()
        tokens: list[int] = choose_split(part, own.start, asked, lambda part: exchange.gather_of(rank, part)).tolist()
        return tokens

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(on_rank, range(size))), exchange.sent_bytes


def rows(temperatures: list[float], seed: int = 7) -> list[ChoiceRow]:
    """Of one position where equal, as siblings of a tree; every third row is another request's."""
    return [
        ChoiceRow(SamplingParameters(seed=seed + index % 3, temperature=temperature), 5 + index // 2, (), HISTORY)
        for index, temperature in enumerate(temperatures)
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 40),
    size=st.sampled_from([1, 2, 3, 4]),
    num_values=st.sampled_from([1, 2, 4, 1000]),
    temperatures=st.lists(st.sampled_from([0.0, 0.3, 1.0, 1e-30]), min_size=1, max_size=6),
)
def test_ranks_choose_what_one_chooses(
    seed: int, vocab_size: int, size: int, num_values: int, temperatures: list[float]
) -> None:
    """Few values make ties within and across ranks; small vocabularies leave the last ranks without tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(num_values, (len(temperatures), vocab_size), generator=generator).float() - num_values / 2
    choice_rows = rows(temperatures, seed)
    said, sent_bytes = choices_of_ranks(logits, choice_rows, size)
    assert said == [choose_tokens(logits, choice_rows)] * size
    num_sampled = sum(temperature > 0 for temperature in temperatures)
    assert sent_bytes == [8 * len(temperatures), *([8 * num_sampled] if num_sampled else [])]


@pytest.mark.parametrize("size", [2, 3])
def test_wide_vocabularies_are_pruned_to_the_same_choice(size: int) -> None:
    vocab_size = 3 * 2**14 + 5
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(8, vocab_size, generator=generator)
    logits[0, : vocab_size // 2] = -1e4  # a rank none of whose tokens can win
    choice_rows = rows([1.0, 0.5, 0.0, 2.0, 1.0, 0.1, 1.0, 5.0])
    said, _ = choices_of_ranks(logits, choice_rows, size)
    assert said == [choose_tokens(logits, choice_rows)] * size


def test_what_looks_at_more_than_the_best_token_is_not_split() -> None:
    def is_split(**options: object) -> bool:
        return can_split(SamplingParameters(**{"seed": 0, **options}), 100)  # type: ignore[arg-type]

    assert is_split()
    assert is_split(temperature=0.0, top_p=0.5, top_k=3)  # filters cannot change a greedy choice
    assert is_split(top_k=100)
    grammar = Grammar(GrammarKind.REGEX, "a*")
    for options in (
        {"top_k": 99},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"temperature": 0.0, "repetition_penalty": 1.1},
        {"temperature": 0.0, "logit_bias": {3: 1.0}},
        {"temperature": 0.0, "grammar": grammar},
    ):
        assert not is_split(**options)
    assert NO_ROWS.sampled == []
