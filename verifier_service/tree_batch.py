"""The trees of one pass: which rows need logits, which only the token chosen there, and the verdicts in the end.

On one rank every row has its logits at hand. Where the vocabulary is split over ranks, logits are gathered only for
cases that look at more than each row's best token (`easyspec/speculation/split_choice.py`).
"""

from __future__ import annotations

from easyspec.errors import EasyspecError
from easyspec.model.decoder import Decoder, PassResult
from easyspec.speculation.messages import Verdict
from easyspec.speculation.sampling import ChoiceRow
from easyspec.speculation.split_choice import SplitRows, split_rows
from verifier_service.verdicts import Case, can_be_chosen_apart, decide


class TreeBatch:
    """Filled before the pass, decided after it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._cases: list[Case] = []
        self._is_apart: list[bool] = []
        self._apart_rows: list[int] = []
        self._apart_choices: list[ChoiceRow] = []
        self.logit_rows: list[int] = []

    @property
    def choice_rows(self) -> SplitRows:
        """The rows at which the pass is to choose tokens, beside `logit_rows`."""
        return split_rows(self._apart_rows, self._apart_choices)

    def add(self, case: Case, root_row: int) -> None:
        """`root_row` of the pass is the case's first; `case.first_row` is the number of `logit_rows` so far."""
        rows = range(root_row, root_row + case.num_rows)
        is_apart = self._decoder.is_vocabulary_split and can_be_chosen_apart(case, self._decoder.config.vocab_size)
        self._cases.append(case)
        self._is_apart.append(is_apart)
        if is_apart:
            self._apart_rows += rows
            self._apart_choices += case.choice_rows()
        else:
            self.logit_rows += rows

    def decide(self, result: PassResult) -> list[Verdict | EasyspecError]:
        """The verdict on each case, in order, from the pass that computed the rows."""
        tokens: list[int] = result.choices.tolist()
        chosen: list[list[int] | None] = []
        for case, is_apart in zip(self._cases, self._is_apart, strict=True):
            chosen.append(tokens[: case.num_rows] if is_apart else None)
            tokens = tokens[case.num_rows :] if is_apart else tokens
        return decide(self._decoder.executor, result.logits, self._cases, chosen)
