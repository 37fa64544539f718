"""Memory of the texts that requests guess from, which no KV budget counts."""

from __future__ import annotations

import weakref

# What a token of a request's own text takes, measured on random ones: 420 bytes in the automaton, 950 in the n-gram
# tables, which keep half as many contexts of each order.
TOKEN_BYTES = 1_400
_MOST_TOKENS, _LEAST_TOKENS = 32_768, 512
_DEFAULT_BYTES = 1 << 30


class TextMemory:
    """A budget that open requests share: each may keep as many tokens as fit, fewer the more requests there are."""

    def __init__(self, num_bytes: int = _DEFAULT_BYTES) -> None:
        self._num_tokens = num_bytes // TOKEN_BYTES
        self._requests: weakref.WeakSet[object] = weakref.WeakSet()

    def join(self, request: object) -> None:
        """One more takes part, as long as the object lives."""
        self._requests.add(request)

    @property
    def most_tokens(self) -> int:
        """What a request may keep now."""
        share = self._num_tokens // max(1, len(self._requests))
        return min(_MOST_TOKENS, max(_LEAST_TOKENS, share))
