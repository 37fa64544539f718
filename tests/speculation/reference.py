"""The choice rule and the acceptance walk, transcribed literally: one row, one token at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch

from easyspec.speculation.acceptance import StopLimits
from easyspec.speculation.parameters import FinishReason, SamplingParameters
from easyspec.speculation.token_tree import TokenTree

MASK = 2**64 - 1


def splitmix64(state: int, index: int) -> int:
    """Element `index` of the splitmix64 stream with this state (Steele, Lea, Flood 2014)."""
    z = (state + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_bits(seed: int, position: int, token_id: int) -> int:
    return splitmix64(splitmix64(splitmix64(0, seed), position), token_id) >> 32


def reference_noise(seed: int, position: int, token_id: int) -> np.float32:
    uniform = (reference_bits(seed, position, token_id) + 0.5) / 2**32
    return np.float32(-math.log(-math.log(uniform)))


def reference_processed(
    logits: Sequence[float],
    sampling: SamplingParameters,
    prompt: Sequence[int],
    output: Sequence[int],
    path: Sequence[int] = (),
    allowed: Collection[int] | None = None,
) -> np.ndarray:
    """Processed logits of one row, float32; `allowed` are the tokens that a grammar leaves."""
    f = np.float32
    x = [f(value) for value in logits]
    for token_id, bias in sampling.logit_bias.items():
        x[token_id] += f(bias)
    counts = Counter([*output, *path])
    for token_id in {*prompt, *output, *path}:
        penalty = f(sampling.repetition_penalty)
        x[token_id] = x[token_id] / penalty if x[token_id] > 0 else x[token_id] * penalty
    for token_id, count in counts.items():
        x[token_id] -= f(count) * f(sampling.frequency_penalty)
        x[token_id] -= f(sampling.presence_penalty)
    if allowed is not None:
        x = [value if token_id in allowed else f(-np.inf) for token_id, value in enumerate(x)]
    if sampling.is_greedy:
        return np.array(x)
    best = max(x)
    with np.errstate(over="ignore"):
        x = [(value - best) / f(max(sampling.temperature, 2.0**-126)) for value in x]
    if sampling.top_k is not None:
        cutoff = sorted(x, reverse=True)[min(sampling.top_k, len(x)) - 1]
        x = [value if value >= cutoff else f(-np.inf) for value in x]
    if sampling.top_p < 1.0:
        x = _top_p(x, sampling.top_p)
    if sampling.min_p > 0.0:
        x = [value if value >= f(math.log(sampling.min_p)) else f(-np.inf) for value in x]
    return np.array(x)


def _top_p(x: list[np.float32], top_p: float) -> list[np.float32]:
    weight = {value: int(float(torch.tensor([value]).exp()) * 2**40) for value in set(x)}
    needed = math.ceil(sum(weight[value] for value in x) * top_p)
    mass = 0
    for value in sorted(x, reverse=True):
        mass += weight[value]
        if mass >= needed:
            return [other if other >= value else np.float32(-np.inf) for other in x]
    raise AssertionError("the whole row has the mass")


def reference_choice(
    logits: Sequence[float],
    sampling: SamplingParameters,
    position: int,
    prompt: Sequence[int],
    output: Sequence[int],
    path: Sequence[int] = (),
    allowed: Collection[int] | None = None,
) -> int:
    """The token chosen at one row."""
    x = reference_processed(logits, sampling, prompt, output, path, allowed)
    if sampling.is_greedy:
        return int(np.argmax(x))
    noise = np.array([reference_noise(sampling.seed, position, token_id) for token_id in range(len(x))])
    return int(np.argmax(x + noise))


class Round(NamedTuple):
    """What a round emits."""

    token_ids: tuple[int, ...]
    accepted_rows: tuple[int, ...]
    finish_reason: FinishReason | None


def reference_walk(tree: TokenTree, choices: Sequence[int], base_length: int, limits: StopLimits) -> Round:
    """The walk first, the cuts afterwards."""
    tokens, rows, row = [], [], 0
    while True:
        tokens.append(choices[row])
        followers = [
            node + 1
            for node in range(len(tree))
            if tree.parent_rows[node] == row and tree.token_ids[node] == choices[row]
        ]
        if not followers:
            break
        row = followers[0]
        rows.append(row)
    room = limits.max_total_length - base_length
    stops = [index for index, token_id in enumerate(tokens) if token_id in limits.stop_token_ids]
    if stops and stops[0] < room:
        end, reason = stops[0] + 1, FinishReason.STOP
    elif len(tokens) >= room:
        end, reason = room, FinishReason.LENGTH
    else:
        end, reason = len(tokens), None
    return Round(tuple(tokens[:end]), tuple(rows[:end]), reason)
