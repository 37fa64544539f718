"""Drafting what a grammar allows: guesses that the verifier could never accept make room for those that it may.

Nothing depends on it. A grammar that is not compiled yet, or cannot be, leaves drafts as they are.

Dimensions: `R` rows of a level, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from drafter_service.growth import Candidates, GrowingTree
from easyspec.errors import EasyspecError
from easyspec.speculation.grammar import GrammarState
from easyspec.speculation.grammar_compiler import GrammarCompiler
from easyspec.speculation.parameters import Grammar
from easyspec.speculation.token_mask import mask_forbidden_

# Scores of forbidden tokens are below, those of others far above.
_FORBIDDEN_SCORE = -1e29
_NOTHING = np.zeros(1, dtype=np.uint8)


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
            state = self._followed(token_ids)
            return unknown if state is None else [_allowed_after(state, path) for path in paths]
        except EasyspecError:
            self._is_given_up = True
            return unknown

    def _followed(self, token_ids: Sequence[int]) -> GrammarState | None:
        """The state after all committed tokens; None until the grammar is compiled."""
        if self._state is None:
            compiled = self._compiler.poll(self._grammar)
            if compiled is None:
                return None
            self._state = GrammarState(compiled, ignore_eos=False)
        for token_id in token_ids[self._num_followed :]:
            self._state.advance(token_id)  # whoever commits what is not allowed knows why: guesses only get worse
        self._num_followed = max(self._num_followed, len(token_ids))
        return self._state


def _allowed_after(state: GrammarState, path: Sequence[int]) -> NDArray[np.uint8]:
    num_followed = 0
    try:
        for token_id in path:
            if not state.advance(token_id):
                return _NOTHING
            num_followed += 1
        return _NOTHING if state.has_ended else state.allowed_bits()
    finally:
        state.rollback(num_followed)


@dataclass(frozen=True)
class LevelMask:
    """What grammars allow at each row of a level; None where anything goes."""

    rows: Sequence[NDArray[np.uint8] | None]

    def applied(self, draft_logits: torch.Tensor) -> torch.Tensor:
        """`draft_logits` [R, V] with forbidden tokens at -inf; the same tensor where there is no grammar."""
        masked = {index: bits for index, bits in enumerate(self.rows) if bits is not None and bits is not _NOTHING}
        if masked:
            draft_logits = draft_logits.clone()
            mask_forbidden_(draft_logits, [*masked], [*masked.values()])
        return draft_logits

    def kept(self, candidates: Sequence[Candidates]) -> list[Candidates]:
        """Each row's candidates, ranked by those logits, without the forbidden ones; possibly none are left."""
        return [
            row_candidates if bits is None else _allowed(row_candidates, may_follow=bits is not _NOTHING)
            for bits, row_candidates in zip(self.rows, candidates, strict=True)
        ]


def _allowed(candidates: Candidates, *, may_follow: bool) -> Candidates:
    """The best are allowed, and what is left of the ranking is not."""
    count = sum(score > _FORBIDDEN_SCORE for score in candidates.scores) if may_follow else 0
    return Candidates(candidates.token_ids[:count], candidates.scores[:count])


def level_mask(levels: Sequence[tuple[GrammarPreference | None, Sequence[int], GrowingTree]]) -> LevelMask:
    """The mask of the next level of several trees, given each session's preference and committed tokens."""
    rows: list[NDArray[np.uint8] | None] = []
    for preference, token_ids, tree in levels:
        if preference is None:
            rows += [None] * len(tree.frontier)
        else:
            rows += preference.allowed_after(token_ids, [tree.path_token_ids(row) for row in tree.frontier])
    return LevelMask(rows)
