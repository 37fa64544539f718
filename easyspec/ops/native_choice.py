"""Choosing and ranking tokens in the C++ library.

Dimensions: `R` rows, `V` vocabulary, `N` tokens that are named, `K` tokens ranked per row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch

from easyspec.ops.native_library import Choice, load
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.ranking import NUM_NOISED_TOKENS, RankedTokens
from easyspec.speculation.sampling import ChoiceRow

_NO_MEMORY = -2


def choose(engine: int, logits: torch.Tensor, place: int, row: ChoiceRow) -> int:
    """The token chosen at `row`, or -1 where some of its logits are not numbers.

    Its logits are those of `logits` float32 [R, V] at `place`; they are changed during the call and put back.
    """
    sampling, vocab_size = row.sampling, logits.shape[1]
    assert 0 <= place < logits.shape[0], f"row {place} of {logits.shape[0]}"
    choice = Choice(
        logits=logits.data_ptr() + place * logits.stride(0) * logits.itemsize,
        vocab_size=vocab_size,
        seed=sampling.seed,
        position=row.position,
        top_p=sampling.top_p,
        temperature=sampling.temperature,
        min_p=sampling.min_p,
        repetition=sampling.repetition_penalty,
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        top_k=min(sampling.top_k or 0, vocab_size),
    )
    # `choice` holds addresses only: these arrays must live until the call returns.
    kept: list[object] = []
    if sampling.logit_bias:
        bias_ids = np.fromiter(sampling.logit_bias.keys(), dtype=np.int64)
        bias_values = np.fromiter(sampling.logit_bias.values(), dtype=np.float32)
        choice.bias_ids, choice.bias_values = bias_ids.ctypes.data, bias_values.ctypes.data
        choice.num_biased = len(bias_ids)
        kept += [bias_ids, bias_values]
    if sampling.has_penalties:
        history = row.history
        path_ids = np.asarray(row.path_token_ids, dtype=np.int64)
        path_slots = np.asarray([history.slots.get(token_id, -1) for token_id in row.path_token_ids], dtype=np.int64)
        choice.seen_ids, choice.counts = history.token_ids.ctypes.data, history.output_counts.ctypes.data
        choice.num_seen, choice.num_path = len(history.token_ids), len(path_ids)
        choice.path_ids, choice.path_slots = path_ids.ctypes.data, path_slots.ctypes.data
        kept += [path_ids, path_slots]
    if row.allowed_bits is not None:
        allowed_bits = np.ascontiguousarray(row.allowed_bits)
        choice.allowed_bits = allowed_bits.ctypes.data
        kept.append(allowed_bits)
    token_id: int = load().easyspec_choose(engine, ctypes.byref(choice))
    if token_id == _NO_MEMORY:
        raise MemoryError("no memory to choose a token")
    return token_id


def rank(
    engine: int,
    logits: torch.Tensor,
    positions: Sequence[int],
    samplings: Sequence[SamplingParameters],
    num_best: int,
    named_ids: torch.Tensor | None = None,
) -> list[RankedTokens]:
    """Each row's best tokens under its noise; `logits` float32 [R, N], whose rows may be further apart than N.

    `named_ids` int64 [N] are their tokens, rising; None: all, N being V.
    """
    num_rows, num_columns = logits.shape
    if num_rows == 0:
        return []
    num_best = min(num_best, num_columns)
    names = None if named_ids is None else named_ids.numpy().astype(np.int32)
    seeds = np.fromiter((sampling.seed for sampling in samplings), dtype=np.uint64, count=num_rows)
    temperatures = np.fromiter((sampling.temperature for sampling in samplings), dtype=np.float32, count=num_rows)
    places = np.fromiter(positions, dtype=np.int64, count=num_rows)
    token_ids = np.empty((num_rows, num_best), dtype=np.int32)
    scores = np.empty((num_rows, num_best), dtype=np.float32)
    load().easyspec_rank(
        engine,
        logits.data_ptr(),
        logits.stride(0),
        num_rows,
        num_columns,
        None if names is None else names.ctypes.data,
        seeds.ctypes.data,
        places.ctypes.data,
        temperatures.ctypes.data,
        NUM_NOISED_TOKENS,
        num_best,
        token_ids.ctypes.data,
        scores.ctypes.data,
    )
    return [
        (tuple(row_ids), tuple(row_scores))
        for row_ids, row_scores in zip(token_ids.tolist(), scores.tolist(), strict=True)
    ]
