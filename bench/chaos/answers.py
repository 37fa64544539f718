"""What a client got, and how it compares with what it should have got."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from easyspec.errors import CapacityError, EasyspecError, UnavailableError


class Verdict(enum.Enum):
    """How an answer compares with the undisturbed one. CUT: it is right as far as it came, which was not to the end."""

    RIGHT = "right"
    CUT = "cut"
    WRONG = "wrong"
    LOST = "lost"
    DOUBLED = "doubled"


@dataclass
class Answer:
    """What a client saw, by choice: tokens, and how it ended (None: it did not). `says_when` is whether an error came
    with the time to wait."""

    token_ids: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    endings: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    error: EasyspecError | None = None
    says_when: bool = False
    longest_pause_s: float = 0.0

    def compared_with(self, whole: Answer) -> Verdict:
        verdicts = [
            _compared(self.token_ids[index], token_ids, self.endings.get(index), whole.endings[index])
            for index, token_ids in whole.token_ids.items()
        ]
        order = (Verdict.WRONG, Verdict.DOUBLED, Verdict.LOST, Verdict.CUT)
        return next((verdict for verdict in order if verdict in verdicts), Verdict.RIGHT)

    @property
    def is_refused_properly(self) -> bool:
        """Whether the error, if any, tells the client to come again, and when."""
        return self.error is None or (self.says_when and isinstance(self.error, UnavailableError | CapacityError))


def _compared(got: Sequence[int], whole: Sequence[int], ending: Any, whole_ending: Any) -> Verdict:
    if list(got) == list(whole) and ending == whole_ending:
        return Verdict.RIGHT
    if list(got) == list(whole[: len(got)]):
        return Verdict.CUT if ending is None else Verdict.LOST
    return Verdict.DOUBLED if list(got[: len(whole)]) == list(whole) else Verdict.WRONG
