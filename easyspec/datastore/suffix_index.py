"""A corpus by what precedes: the longest suffix of a text that occurs in it, and what followed there.

The corpus is stored backwards, so that the texts before two places compare as the suffixes that begin there, and one
binary search finds the longest match. Tokens are big-endian, so that comparing bytes compares tokens. A corpus is
cut into shards, each with a suffix array of its own: building needs memory for one shard, searching for none.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from easyspec.datastore.corpus import SEPARATOR, Tokens
from easyspec.datastore.sections import SectionReader, SectionWriter
from easyspec.errors import ConfigurationError

KIND = "suffix index"
MAX_SHARD_TOKENS = 1 << 26
_TOKEN_BYTES = 4
_WRITTEN_BYTES = 1 << 24


@dataclass(frozen=True)
class Match:
    """Places of one shard where the last `length` tokens of a context occur: rows `begin` to `end` of its array."""

    shard: int
    length: int
    begin: int
    end: int

    @property
    def num_places(self) -> int:
        return self.end - self.begin


class SuffixIndex:
    """Read-only and memory-mapped; raises ConfigurationError for a file that does not fit."""

    def __init__(self, path: Path, tokenizer_fingerprint: str) -> None:
        reader = SectionReader(path, KIND, tokenizer_fingerprint)
        self.num_tokens = int(reader.metadata["num_tokens"])
        shards = range(int(reader.metadata["num_shards"]))
        self._tokens = [reader.section(f"tokens.{shard}", "B") for shard in shards]
        self._suffixes = [reader.section(f"suffixes.{shard}", "I") for shard in shards]

    def longest_matches(self, context: list[int], min_length: int, max_length: int) -> list[Match]:
        """The longest suffix of `context` in each shard that has one of at least `min_length` tokens."""
        key = np.array(context[: -max_length - 1 : -1], dtype=">u4").tobytes()
        matches = []
        for shard, suffixes in enumerate(self._suffixes):
            prefix = self._prefixes(shard, len(key))
            row = bisect_left(suffixes, key, key=prefix)
            beside = suffixes[max(0, row - 1) : row + 1]
            length = max((_common_length(key, prefix(suffix)) for suffix in beside), default=0)
            if length >= min_length:
                matches.append(self._range(shard, key[: length * _TOKEN_BYTES], row))
        return matches

    def shorten(self, context: list[int], match: Match, length: int) -> Match:
        """The places of a shorter suffix of the context: those of the match, and more."""
        key = np.array(context[: -length - 1 : -1], dtype=">u4").tobytes()
        return self._range(match.shard, key, match.begin)

    def continuations(self, match: Match, max_places: int, num_tokens: int) -> list[tuple[int, ...]]:
        """Up to `num_tokens` tokens that followed at up to `max_places` places, evenly spread over all of them."""
        tokens, suffixes = self._tokens[match.shard], self._suffixes[match.shard]
        step = max(1, -(-match.num_places // max_places))
        found = []
        for row in range(match.begin, match.end, step):
            end = suffixes[row] * _TOKEN_BYTES
            begin = max(0, end - num_tokens * _TOKEN_BYTES)
            followed = struct.unpack(f">{(end - begin) // _TOKEN_BYTES}I", tokens[begin:end])[::-1]
            if SEPARATOR in followed:
                followed = followed[: followed.index(SEPARATOR)]
            found.append(followed)
        return found

    def _range(self, shard: int, key: bytes, row: int) -> Match:
        """Every row that begins with `key`, given one next to which they stand; looked for in steps that double."""
        suffixes, prefix = self._suffixes[shard], self._prefixes(shard, len(key))
        begin, step = row, 1
        while begin > 0 and prefix(suffixes[begin - 1]) >= key:
            begin, step = max(0, begin - step), step * 2
        end, step = row, 1
        while end < len(suffixes) and prefix(suffixes[end]) <= key:
            end, step = min(len(suffixes), end + step), step * 2
        begin = bisect_left(suffixes, key, begin, row, key=prefix)
        end = bisect_right(suffixes, key, row, end, key=prefix)
        return Match(shard, len(key) // _TOKEN_BYTES, begin, end)

    def _prefixes(self, shard: int, num_bytes: int) -> Callable[[int], bytes]:
        """What gives the first bytes of a suffix of the shard."""
        tokens = self._tokens[shard]

        def prefix(suffix: int) -> bytes:
            place = suffix * _TOKEN_BYTES
            return bytes(tokens[place : place + num_bytes])

        return prefix


def _common_length(key: bytes, prefix: bytes) -> int:
    """How many tokens they begin with alike."""
    num_bytes = next((i for i, (a, b) in enumerate(zip(key, prefix, strict=False)) if a != b), len(prefix))
    return num_bytes // _TOKEN_BYTES


def build_suffix_index(
    tokens: Tokens, path: Path, tokenizer_fingerprint: str, max_shard_tokens: int = MAX_SHARD_TOKENS
) -> None:
    """Write the index of a corpus of documents, a separator after each; `tokens` may be memory-mapped."""
    num_shards = -(-len(tokens) // max_shard_tokens)
    with SectionWriter(path, KIND, tokenizer_fingerprint) as writer:
        writer.metadata = {"num_tokens": len(tokens), "num_shards": num_shards}
        for shard in range(num_shards):
            backwards = tokens[shard * max_shard_tokens : (shard + 1) * max_shard_tokens][::-1]
            writer.write(f"tokens.{shard}", _pieces(backwards, ">u4"))
            writer.write(f"suffixes.{shard}", _pieces(_suffix_array(backwards), "<u4"))


def _suffix_array(tokens: Tokens) -> Tokens:
    """Where the suffixes of `tokens` begin, in the order of their tokens.

    Tokens are written in as few bytes as hold them, the separator as the largest number: sorting suffixes of bytes
    and keeping what begins at a token sorts suffixes of tokens.
    """
    try:
        from pydivsufsort import divsufsort
    except ImportError as error:
        raise ConfigurationError("building an index needs pydivsufsort: pip install 'easyspec[index]'") from error
    is_separator = tokens == SEPARATOR
    largest = int(tokens[~is_separator].max(initial=0)) + 1
    num_bytes = next(count for count in (1, 2, 3, 4) if largest < 256**count)
    digits = np.empty((len(tokens), num_bytes), dtype=np.uint8)
    for digit in range(num_bytes):
        digits[:, num_bytes - 1 - digit] = (tokens >> np.uint32(8 * digit)) & np.uint32(0xFF)
    digits[is_separator] = 0xFF
    places = divsufsort(digits.reshape(-1))
    aligned = places[places % num_bytes == 0]
    aligned //= num_bytes
    suffixes: Tokens = aligned.astype(np.uint32)
    return suffixes


def _pieces(numbers: Tokens, dtype: str) -> Iterator[bytes]:
    step = _WRITTEN_BYTES // _TOKEN_BYTES
    for begin in range(0, len(numbers), step):
        yield numbers[begin : begin + step].astype(dtype).tobytes()
