"""Texts that the base wrote, read back as batches for training.

Dimensions: B texts of a batch, T tokens, M tokens that the base wrote, K kept logits.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.recipe.smollm2.writing import ASSISTANT, GIVEN

_RUN_TOKENS = 12


@dataclass(frozen=True)
class WrittenText:
    """Token ids and writers [T]; of the M tokens that the base wrote, its likeliest tokens and their
    log-probabilities at temperature 1, [M, K]."""

    token_ids: NDArray[np.uint16]
    writers: NDArray[np.uint8]
    best_ids: NDArray[np.uint16]
    best_logprobs: NDArray[np.float16]


@dataclass(frozen=True)
class Batch:
    """Texts padded to one length. `rows` [M] are the places in the flattened [B * T] whose next token the base wrote,
    `best_ids` and `best_logprobs` [M, K] what it found likely there, `weights` [M] how much each counts."""

    token_ids: Tensor
    rows: Tensor
    best_ids: Tensor
    best_logprobs: Tensor
    weights: Tensor


def read_texts(folder: Path, shards: Sequence[int]) -> list[WrittenText]:
    """The texts of the shards that are there, in their order; one whose user's turn was seen before is left out."""
    texts: list[WrittenText] = []
    seen: set[bytes] = set()
    for shard in shards:
        path = folder / f"{shard:05}.npz"
        if path.exists():
            for text in _texts_of(path):
                answered = np.flatnonzero(text.writers == ASSISTANT)
                beginning = text.token_ids[: answered[0] if len(answered) else None].tobytes()
                if beginning not in seen and len(text.best_ids) > 1:
                    seen.add(beginning)
                    texts.append(text)
    return texts


def without_runs_of(texts: Sequence[WrittenText], held_out: Sequence[Sequence[int]]) -> list[WrittenText]:
    """The texts that contain no run of 12 tokens of those held out, and none of these whole if it is shorter."""
    runs: dict[int, set[bytes]] = defaultdict(set)
    for token_ids in held_out:
        length = min(len(token_ids), _RUN_TOKENS)
        runs[length] |= _runs(np.asarray(token_ids, np.uint16), length)
    return [text for text in texts if all(_runs(text.token_ids, n).isdisjoint(found) for n, found in runs.items())]


def batches(
    texts: Sequence[WrittenText], tokens_per_batch: int, epoch_seed: str, user_weight: float
) -> Iterator[Batch]:
    """Every text once, in seeded order, texts of about one length together."""
    order = list(range(len(texts)))
    choose = random.Random(epoch_seed)
    choose.shuffle(order)
    groups: list[list[int]] = []
    for start in range(0, len(order), 128):
        group: list[int] = []
        for index in sorted(order[start : start + 128], key=lambda index: len(texts[index].token_ids)):
            if (len(group) + 1) * len(texts[index].token_ids) > tokens_per_batch and group:
                groups.append(group)
                group = []
            group.append(index)
        groups.append(group)
    choose.shuffle(groups)
    for group in groups:
        yield collate([texts[index] for index in group], user_weight)


def collate(texts: Sequence[WrittenText], user_weight: float) -> Batch:
    """One batch; a token of a user's turn counts `user_weight`, one of an answer 1."""
    length = max(len(text.token_ids) for text in texts)
    token_ids = np.zeros((len(texts), length), np.int64)
    rows, weights = [], []
    for place, text in enumerate(texts):
        token_ids[place, : len(text.token_ids)] = text.token_ids
        written = np.flatnonzero(text.writers != GIVEN)
        rows.append(place * length + written - 1)
        weights.append(np.where(text.writers[written] == ASSISTANT, 1.0, user_weight))
    return Batch(
        torch.from_numpy(token_ids),
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate([text.best_ids for text in texts]).astype(np.int64)),
        torch.from_numpy(np.concatenate([text.best_logprobs for text in texts]).astype(np.float32)),
        torch.from_numpy(np.concatenate(weights).astype(np.float32)),
    )


def _texts_of(path: Path) -> Iterator[WrittenText]:
    with np.load(path) as stored:
        lengths, token_ids, writers = stored["lengths"], stored["token_ids"], stored["writers"]
        best_ids, best_logprobs = stored["best_ids"], stored["best_logprobs"]
    ends = np.cumsum(lengths)
    written_ends = np.cumsum(writers != GIVEN)
    for length, end in zip(lengths, ends, strict=True):
        start = end - length
        first = written_ends[start - 1] if start else 0
        kept = slice(first, written_ends[end - 1])
        yield WrittenText(token_ids[start:end], writers[start:end], best_ids[kept], best_logprobs[kept])


def _runs(token_ids: NDArray[np.uint16], length: int) -> set[bytes]:
    return {token_ids[start : start + length].tobytes() for start in range(len(token_ids) - length + 1)}
