"""What follows a few tokens in a corpus, and how often: contexts of one to three tokens, the commonest successors.

A context is looked up by a 64-bit key, its tokens mixed; two contexts of a corpus share one with a chance of about
2^-43 a pair, and then a guess is worse, nothing else.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from easyspec.datastore.corpus import SEPARATOR, Tokens
from easyspec.datastore.sections import SectionReader, SectionWriter

KIND = "n-gram table"
MAX_ORDER = 3
"""Most tokens of a context."""
NUM_SUCCESSORS = 12
"""Most successors kept of a context (ADED's number)."""

# An entry is a context's key in the upper 43 bits and the successor in the lower 21: numbers that sort.
_TOKEN_BITS = 21
_MAX_TOKEN = (1 << _TOKEN_BITS) - 1
_KEY_MASK = (1 << 43) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK_64 = 2**64 - 1
# Sorted at once, with 24 bytes of memory a token; merging sorted chunks takes longer than sorting.
_CHUNK_TOKENS = 1 << 26

_Keys = npt.NDArray[np.uint64]
_Counts = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Successors:
    """What followed a context: tokens and counts, commonest first, and how often the context was followed at all."""

    token_ids: Sequence[int]
    counts: Sequence[int]
    total: int


class NgramTable:
    """Read-only and memory-mapped; raises ConfigurationError for a file that does not fit."""

    def __init__(self, path: Path, tokenizer_fingerprint: str) -> None:
        reader = SectionReader(path, KIND, tokenizer_fingerprint)
        self.num_tokens = int(reader.metadata["num_tokens"])
        orders = range(1, MAX_ORDER + 1)
        self._contexts = {order: reader.section(f"contexts.{order}", "Q") for order in orders}
        self._begins = {order: reader.section(f"begins.{order}", "I") for order in orders}
        self._totals = {order: reader.section(f"totals.{order}", "I") for order in orders}
        self._tokens = {order: reader.section(f"tokens.{order}", "I") for order in orders}
        self._counts = {order: reader.section(f"counts.{order}", "I") for order in orders}

    def successors(self, context: Sequence[int]) -> Successors | None:
        """What followed these one to three tokens; None if they were not seen, or not twice."""
        order = len(context)
        contexts, key = self._contexts[order], context_key(context)
        row = bisect.bisect_left(contexts, key)
        if row == len(contexts) or contexts[row] != key:
            return None
        begin, end = self._begins[order][row], self._begins[order][row + 1]
        return Successors(
            self._tokens[order][begin:end].tolist(), self._counts[order][begin:end].tolist(), self._totals[order][row]
        )

    def commonest(self, num_tokens: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Up to `num_tokens` of the tokens that were followed by another, with their shares of all of those."""
        contexts, totals = np.asarray(self._contexts[1]), np.asarray(self._totals[1])
        if not len(contexts):
            return np.empty(0, dtype=np.int64), np.empty(0)
        # Keys do not name their token. A token that is never a common successor is not common.
        token_ids = np.unique(np.asarray(self._tokens[1]))
        keys = _context_keys([token_ids], len(token_ids), 1)
        rows = np.minimum(np.searchsorted(contexts, keys), len(contexts) - 1)
        counts = np.where(contexts[rows] == keys, totals[rows], 0)
        chosen = np.argsort(-counts.astype(np.int64), kind="stable")[:num_tokens]
        chosen = chosen[counts[chosen] > 0]
        return token_ids[chosen].astype(np.int64), counts[chosen] / totals.sum(dtype=np.int64)


def context_key(context: Sequence[int]) -> int:
    key = len(context)
    for token_id in context:
        key = ((key ^ token_id) * _MULTIPLIER) & _MASK_64
        key ^= key >> 29
    return key & _KEY_MASK


def build_ngram_table(tokens: Tokens, path: Path, tokenizer_fingerprint: str) -> None:
    """Write the table of a corpus of documents, a separator after each; `tokens` may be memory-mapped.

    Contexts of two and three tokens that occur once are left out: they predict little and are most of them.
    """
    assert len(tokens) == 0 or int(tokens[tokens != SEPARATOR].max(initial=0)) <= _MAX_TOKEN, "a vocabulary of 2^21"
    with SectionWriter(path, KIND, tokenizer_fingerprint) as writer:
        writer.metadata = {"num_tokens": len(tokens)}
        for order in range(1, MAX_ORDER + 1):
            _write_order(writer, order, *_count(tokens, order))


def _count(tokens: Tokens, order: int) -> tuple[_Keys, _Counts]:
    """Every (context, successor) of the corpus as a sorted entry, with its count; counted chunk by chunk."""
    entries, counts = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint32)
    for begin in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[max(0, begin - order) : begin + _CHUNK_TOKENS]
        added = np.sort(_entries(chunk, order))
        firsts = _firsts(added)
        added_counts = np.diff(firsts, append=len(added)).astype(np.uint32)
        entries, counts = _merged(entries, counts, added[firsts], added_counts)
    return entries, counts


def _entries(tokens: Tokens, order: int) -> _Keys:
    """An entry for every token that has `order` tokens of its document before it."""
    num_entries = max(0, len(tokens) - order)
    columns = [tokens[offset : offset + num_entries] for offset in range(order)]
    is_whole = tokens[order:] != SEPARATOR
    for column in columns:
        is_whole &= column != SEPARATOR
    keys = _context_keys(columns, num_entries, order) << np.uint64(_TOKEN_BITS)
    keys |= tokens[order:].astype(np.uint64)
    entries: _Keys = keys[is_whole]
    return entries


def _context_keys(columns: Sequence[Tokens], num_contexts: int, order: int) -> _Keys:
    """`context_key` of many contexts, whose tokens are in `columns`."""
    keys = np.full(num_contexts, order, dtype=np.uint64)
    for column in columns:
        keys = (keys ^ column.astype(np.uint64)) * np.uint64(_MULTIPLIER)
        keys ^= keys >> np.uint64(29)
    return keys & np.uint64(_KEY_MASK)


def _firsts(numbers: _Keys) -> npt.NDArray[np.intp]:
    """Where another number begins in a sorted row of them."""
    return np.flatnonzero(np.diff(numbers, prepend=numbers[:1] + np.uint64(1)))


def _merged(entries: _Keys, counts: _Counts, added: _Keys, added_counts: _Counts) -> tuple[_Keys, _Counts]:
    if len(entries) == 0:
        return added, added_counts
    both = np.concatenate([entries, added])
    order = np.argsort(both, kind="stable")
    both = both[order]
    firsts = _firsts(both)
    totals = np.add.reduceat(np.concatenate([counts, added_counts])[order], firsts)
    return both[firsts], totals.astype(np.uint32)


def _write_order(writer: SectionWriter, order: int, entries: _Keys, counts: _Counts) -> None:
    contexts = entries >> np.uint64(_TOKEN_BITS)
    firsts = _firsts(contexts)
    contexts, lengths = contexts[firsts], np.diff(firsts, append=len(entries))
    totals = np.add.reduceat(counts, firsts) if len(firsts) else counts
    if order > 1:
        is_kept = totals > 1
        is_kept_entry = np.repeat(is_kept, lengths)
        entries, counts = entries[is_kept_entry], counts[is_kept_entry]
        contexts, lengths, totals = contexts[is_kept], lengths[is_kept], totals[is_kept]
    # By context, then by count downwards; equal counts stay in the order of token ids.
    rows = np.repeat(np.arange(len(contexts), dtype=np.uint64), lengths)
    by_count = np.argsort((rows << np.uint64(32)) | (np.uint64(2**32 - 1) - counts.astype(np.uint64)), kind="stable")
    ranks = np.arange(len(entries)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    common = by_count[ranks < NUM_SUCCESSORS]
    begins = np.concatenate([[0], np.cumsum(np.minimum(lengths, NUM_SUCCESSORS))])
    writer.write(f"contexts.{order}", [contexts.astype("<u8").tobytes()])
    writer.write(f"begins.{order}", [begins.astype("<u4").tobytes()])
    writer.write(f"totals.{order}", [totals.astype("<u4").tobytes()])
    writer.write(f"tokens.{order}", [(entries[common] & np.uint64(_MAX_TOKEN)).astype("<u4").tobytes()])
    writer.write(f"counts.{order}", [counts[common].astype("<u4").tobytes()])
