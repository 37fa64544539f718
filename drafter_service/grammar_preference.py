"""Drafting what a grammar allows: guesses that the verifier could never accept make room for guesses that it may.

Nothing depends on it. A grammar that is not compiled yet, or cannot be, leaves drafts as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from easyspec.errors import EasyspecError
from easyspec.speculation.grammar import GrammarState
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.parameters import Grammar

# No bit: nothing may follow.
NOTHING_ALLOWED = np.zeros(1, dtype=np.uint8)


def may_follow(bits: NDArray[np.uint8], token_id: int) -> bool:
    """Whether a token is among those allowed."""
    return token_id // 8 < len(bits) and bool(bits[token_id // 8] >> token_id % 8 & 1)


class GrammarPreference:
    """One session's place in its grammar; its output begins at position `num_prompt_tokens`."""

    def __init__(self, compiler: GrammarCompiler, grammar: Grammar, num_prompt_tokens: int) -> None:
        self._compiler = compiler
        self._grammar = grammar
        self._num_followed = num_prompt_tokens
        self._state: GrammarState | None = None
        self._is_given_up = False
        self.allowed_after((), [])  # have it compiled while the prompt is read

    def allowed_after(self, token_ids: Sequence[int], paths: Sequence[Sequence[int]]) -> list[NDArray[np.uint8] | None]:
        """What may follow each of `paths`, which begin after the committed `token_ids` (prompt and all output).

        As `GrammarState.allowed_bits` has it; None where that is unknown, no bit where nothing may follow.
        """
        unknown: list[NDArray[np.uint8] | None] = [None] * len(paths)
        if self._is_given_up:
            return unknown
        try:
            if self._state is None:
                compiled = self._compiler.poll(self._grammar)
                if compiled is None:
                    return unknown
                self._state = GrammarState(compiled, ignore_eos=False)
            for token_id in token_ids[self._num_followed :]:
                self._state.advance(token_id)  # if what is committed is not allowed, guesses only get worse
            self._num_followed = max(self._num_followed, len(token_ids))
            return [_allowed_after(self._state, path) for path in paths]
        except EasyspecError:
            self._is_given_up = True
            return unknown


def _allowed_after(state: GrammarState, path: Sequence[int]) -> NDArray[np.uint8]:
    num_followed = 0
    try:
        for token_id in path:
            if not state.advance(token_id):
                return NOTHING_ALLOWED
            num_followed += 1
        return NOTHING_ALLOWED if state.has_ended else state.allowed_bits()
    finally:
        state.rollback(num_followed)
