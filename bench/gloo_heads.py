"""Choosing tokens at the rows of a tree over a split vocabulary: logits gathered, or each rank's best alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.gloo_models import typical
from easyspec.parallel.ranks import GroupRanks
from easyspec.parallel.shard import Shard
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sampling import ChoiceRow, TokenHistory, choose_tokens
from easyspec.speculation.split_choice import choose_split, split_rows

NUM_ROWS = 16
VOCAB_SIZES = (8192, 128_256)
_REPEATS, _WARM_UPS = 15, 3


@dataclass(frozen=True)
class HeadTimes:
    """Milliseconds on rank 0 from each rank's logits to tokens, and bytes that a rank sends for them."""

    num_ranks: int
    vocab_size: int
    sampling: str
    gathered_ms: float
    gathered_bytes: int
    split_ms: float
    split_bytes: int


def measure_heads(ranks: GroupRanks) -> list[HeadTimes]:
    """Every rank calls it; rank 0's times count."""
    samplings = {"greedy": SamplingParameters(0, temperature=0.0), "sampled": SamplingParameters(0, temperature=1.0)}
    return [
        _measure(ranks, vocab_size, name, sampling)
        for vocab_size in VOCAB_SIZES
        for name, sampling in samplings.items()
    ]


def _measure(ranks: GroupRanks, vocab_size: int, name: str, sampling: SamplingParameters) -> HeadTimes:
    own = Shard(ranks.rank, ranks.size).vocabulary(vocab_size)
    logits = 4 * torch.randn(NUM_ROWS, len(own), generator=torch.Generator().manual_seed(ranks.rank))
    history = TokenHistory(())
    # The rows of a tree: two of a depth share a position, hence their noise.
    rows = [ChoiceRow(sampling, 100 + row // 2, (), history) for row in range(NUM_ROWS)]
    asked = split_rows([*range(NUM_ROWS)], rows)

    def gathered() -> object:
        whole = ranks.gather(logits).transpose(0, 1).flatten(1)
        return choose_tokens(whole, rows) if ranks.rank == 0 else None

    def split() -> object:
        return choose_split(logits, own.start, asked, ranks.gather).tolist()

    gathered_ms, gathered_bytes = _timed(ranks, gathered)
    split_ms, split_bytes = _timed(ranks, split)
    return HeadTimes(ranks.size, vocab_size, name, gathered_ms, gathered_bytes, split_ms, split_bytes)


def _timed(ranks: GroupRanks, choose: Callable[[], object]) -> tuple[float, int]:
    times = []
    for _ in range(_REPEATS + _WARM_UPS):
        ranks.gather(torch.zeros(1))
        num_bytes = ranks.num_bytes["gather"]
        started = time.perf_counter()
        choose()
        times.append(1e3 * (time.perf_counter() - started))
        num_bytes = ranks.num_bytes["gather"] - num_bytes
    return typical(times[_WARM_UPS:]), num_bytes
