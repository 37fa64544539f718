"""From logits to verdicts: choices, walks, grammars and log-probabilities of a batch of trees.

Dimension key: `R` rows of the batch, `V` vocabulary.

Choices are made along the walk, one level at a time: a row that is not reached needs none. Where a device makes the
host wait for each look, all rows without a grammar are chosen at together, and the walk picks from them. A grammar's
state only ever advances by tokens of the output, exactly as in plain decoding.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from easyspec.errors import BrokenModelError, EasyspecError
from easyspec.speculation.acceptance import StopLimits, Walk
from easyspec.speculation.grammar import GrammarState
from easyspec.speculation.logprobs import row_logprobs
from easyspec.speculation.messages import Verdict
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sampling import ChoiceRow, TokenHistory, tree_choice_row
from easyspec.speculation.split_choice import can_split
from easyspec.speculation.token_tree import TokenTree
from easyspec.speculation.transfer import to_device


@dataclass(slots=True)  # not frozen, which takes twice as long to make: one a session and step
class Case:
    """A tree to judge, whose rows of the batch begin at `first_row`, behind `base_length` committed tokens.

    `grammar` is advanced by the tokens of the verdict. `num_top_logprobs` None: no log-probabilities. Before the
    position `min_length` only the tokens of `unending_bits` (as `ChoiceRow.allowed_bits`) may be chosen.
    """

    tree: TokenTree
    base_length: int
    sampling: SamplingParameters
    history: TokenHistory
    limits: StopLimits
    first_row: int = 0
    grammar: GrammarState | None = None
    num_top_logprobs: int | None = None
    min_length: int = 0
    unending_bits: NDArray[np.uint8] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.tree) + 1

    def choice_row(self, row: int) -> ChoiceRow:
        """Where a token is chosen at a row of the tree. Made when it is asked for: a walk comes to few rows."""
        choice_row = tree_choice_row(self.tree, row, self.base_length, self.sampling, self.history)
        if choice_row.position < self.min_length:
            return replace(choice_row, allowed_bits=self.unending_bits)
        return choice_row

    def choice_rows(self) -> list[ChoiceRow]:
        """All rows, root first."""
        return [self.choice_row(row) for row in range(self.num_rows)]


def can_be_chosen_apart(case: Case, vocab_size: int) -> bool:
    """Whether the verdict needs no logits, but the token chosen at each row alone."""
    return (
        case.num_top_logprobs is None
        and case.grammar is None
        and case.base_length >= case.min_length
        and can_split(case.sampling, vocab_size)
    )


class TokenChooser(Protocol):
    """What chooses tokens; an executor."""

    @property
    def chooses_lazily(self) -> bool: ...
    def choose_tokens(self, base_logits: Tensor, rows: Sequence[ChoiceRow], places: Sequence[int]) -> list[int]: ...


def decide(
    chooser: TokenChooser, base_logits: Tensor, cases: Sequence[Case], chosen: Sequence[Sequence[int] | None] = ()
) -> list[Verdict | EasyspecError]:
    """The verdict on each tree, from `base_logits` (float32 [R, V]), or the error that ends its session alone.

    A session whose walk comes to a row with NaN or infinity ends with BrokenModelError; on an accelerator these are
    not looked for, which would take another look at the device.

    `chosen` are the tokens at the rows of those cases that `can_be_chosen_apart`, and None for the others.
    """
    known = [*chosen, *[None] * (len(cases) - len(chosen))]
    walkers = [
        _Walker(case, is_stepwise=choices is None and (case.grammar is not None or chooser.chooses_lazily))
        for case, choices in zip(cases, known, strict=True)
    ]
    for walker, choices in zip(walkers, known, strict=True):
        if choices is not None:
            walker.take(choices)
    # One call for all walks that go on: on an accelerator each call is a look at the device.
    while active := [walker for walker in walkers if walker.rows]:
        places = [walker.case.first_row + row for walker in active for row in walker.rows]
        choices = chooser.choose_tokens(base_logits, [row for walker in active for row in walker.choice_rows], places)
        for walker in active:
            num_rows = len(walker.rows)
            walker.take(choices[:num_rows])
            choices = choices[num_rows:]
    return _with_logprobs(base_logits, walkers, [walker.outcome() for walker in walkers])


class _Walker:
    """One tree on its way to a verdict: `rows` of the tree, described by `choice_rows`, are to be chosen at next.

    Stepwise, that is the row that the walk has come to, else all rows at once.
    """

    def __init__(self, case: Case, *, is_stepwise: bool) -> None:
        self.case = case
        self._is_stepwise = is_stepwise
        self._walk = Walk(case.tree, case.base_length, case.limits)
        self._error: EasyspecError | None = None
        self.rows: list[int] = [] if is_stepwise else [*range(case.num_rows)]
        self.choice_rows = [] if is_stepwise else case.choice_rows()
        self._await_choice()

    def take(self, choices: Sequence[int]) -> None:
        """Go on with the choices made at `rows`; -1 where the logits are not numbers."""
        if self._is_stepwise:
            # The walk first: it says whether the output ends here, and then the grammar is not asked.
            (token_id,) = choices
            self._step(token_id)
            if self.case.grammar is not None and self._error is None and self._walk.finish_reason is None:
                self._follow(self.case.grammar, token_id)
        else:
            while self._walk.row is not None and self._error is None:
                self._step(choices[self._walk.row])
        self._await_choice()

    def _step(self, token_id: int) -> None:
        if token_id < 0:
            self._error = BrokenModelError(
                "the base model computes values that are not numbers (NaN or infinity): its weights are damaged, or "
                "overflow in the type it is computed in (--dtype)"
            )
        else:
            self._walk.step(token_id)

    def _follow(self, grammar: GrammarState, token_id: int) -> None:
        try:
            is_followed = grammar.advance(token_id)
        except EasyspecError as error:
            self._error = error
        else:
            assert is_followed, "the mask allowed it"

    def _await_choice(self) -> None:
        """Ask for the row that the walk has come to, with a grammar under its mask."""
        row, grammar = self._walk.row, self.case.grammar
        if row is None or self._error is not None:
            self.rows = []
        elif self._is_stepwise and grammar is None:
            self.rows, self.choice_rows = [row], [self.case.choice_row(row)]
        elif grammar is not None:
            try:
                allowed_bits = grammar.allowed_bits()
            except EasyspecError as error:
                self._error, self.rows = error, []
            else:
                self.rows = [row]
                self.choice_rows = [_also_allowing(self.case.choice_row(row), allowed_bits)]

    def outcome(self) -> Verdict | EasyspecError:
        return self._error or self._walk.verdict()

    @property
    def visited_rows(self) -> list[int]:
        """Rows of the batch at which the verdict's tokens were chosen."""
        return [self.case.first_row + row for row in self._walk.visited_rows]


def _also_allowing(row: ChoiceRow, grammar_bits: NDArray[np.uint8]) -> ChoiceRow:
    """The row under its grammar too, which comes first where nothing would be left."""
    own_bits = row.allowed_bits
    both = grammar_bits if own_bits is None else grammar_bits & own_bits
    return replace(row, allowed_bits=both if both.any() else grammar_bits)


def _with_logprobs(
    base_logits: Tensor, walkers: Sequence[_Walker], outcomes: Sequence[Verdict | EasyspecError]
) -> list[Verdict | EasyspecError]:
    """The outcomes, with log-probabilities where asked for, all of which are read at once."""
    rows: list[int] = []
    token_ids: list[int] = []
    num_tops: list[int] = []
    for walker, outcome in zip(walkers, outcomes, strict=True):
        if isinstance(outcome, Verdict) and walker.case.num_top_logprobs is not None:
            rows += walker.visited_rows
            token_ids += outcome.token_ids
            num_tops += [walker.case.num_top_logprobs] * len(outcome.token_ids)
    if not rows:
        return [*outcomes]
    if len(rows) < len(base_logits):  # they come in order: else these are all of them
        base_logits = base_logits[to_device(rows, torch.int64, base_logits.device)]
    entries = iter(row_logprobs(base_logits, token_ids, num_tops))
    return [
        replace(outcome, logprobs=tuple(itertools.islice(entries, len(outcome.token_ids))))
        if isinstance(outcome, Verdict) and walker.case.num_top_logprobs is not None
        else outcome
        for walker, outcome in zip(walkers, outcomes, strict=True)
    ]
