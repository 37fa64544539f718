"""The noise of `coupling` without torch, for guessers that look at few tokens: one at a time, or some thousands."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_MASK_64 = 2**64 - 1
_STREAM_INCREMENT = 0x9E3779B97F4A7C15
_FIRST_MULTIPLIER, _SECOND_MULTIPLIER = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_UNIFORM_BITS = 32


class HostNoise:
    """The noise of one request, by its seed (uint64).

    The random bits are those of `coupling.uniform_bits`. The logarithms are this machine's in float64, unrounded: the
    verifier rounds to float32, a difference that can only turn a guess, and only at a near tie.
    """

    def __init__(self, seed: int) -> None:
        self._state = _mix(_element(seed, 0))

    def at(self, position: int) -> PositionNoise:
        """The noise of every token at an absolute position."""
        return PositionNoise(_mix(_element(position, self._state)))


class PositionNoise:
    """Gumbel noise by token id, at one position of one request; what was asked once is remembered."""

    __slots__ = ("_known", "_stream")

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._known: dict[int, float] = {}

    def of(self, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        bits = (token_ids + 1).astype(np.uint64) * np.uint64(_STREAM_INCREMENT) + np.uint64(self._stream)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_FIRST_MULTIPLIER)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_SECOND_MULTIPLIER)
        bits = (bits ^ (bits >> np.uint64(31))) >> np.uint64(64 - _UNIFORM_BITS)
        noise: npt.NDArray[np.float64] = -np.log(-np.log((bits + 0.5) * 2.0**-_UNIFORM_BITS))
        return noise

    def __call__(self, token_id: int) -> float:
        known = self._known.get(token_id)
        if known is not None:
            return known
        # splitmix64's finaliser, written out: this is the inner loop of drafting from text.
        bits = ((token_id + 1) * _STREAM_INCREMENT + self._stream) & _MASK_64
        bits = ((bits ^ (bits >> 30)) * _FIRST_MULTIPLIER) & _MASK_64
        bits = ((bits ^ (bits >> 27)) * _SECOND_MULTIPLIER) & _MASK_64
        bits = (bits ^ (bits >> 31)) >> (64 - _UNIFORM_BITS)
        noise = self._known[token_id] = -math.log(-math.log((bits + 0.5) * 2.0**-_UNIFORM_BITS))
        return noise


def _element(index: int, state: int) -> int:
    return ((index + 1) * _STREAM_INCREMENT + state) & _MASK_64


def _mix(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * _FIRST_MULTIPLIER) & _MASK_64
    bits = ((bits ^ (bits >> 27)) * _SECOND_MULTIPLIER) & _MASK_64
    return bits ^ (bits >> 31)
