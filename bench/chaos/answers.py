"""What a client got, and how it compares with what it should have got."""

from __future__ import annotations

import enum
from collections import defaultdict
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
        verdicts = set()
        for index, expected in whole.token_ids.items():
            got, ending = self.token_ids[index], self.endings.get(index)
            if got == expected and ending == whole.endings[index]:
                continue
            if got == expected[: len(got)]:
                verdicts.add(Verdict.CUT if ending is None else Verdict.LOST)
            else:
                verdicts.add(Verdict.DOUBLED if got[: len(expected)] == expected else Verdict.WRONG)
        order = (Verdict.WRONG, Verdict.DOUBLED, Verdict.LOST, Verdict.CUT)
        return next((verdict for verdict in order if verdict in verdicts), Verdict.RIGHT)

    @property
    def is_refused_properly(self) -> bool:
        """Whether the error, if any, tells the client to come again, and when."""
        return self.error is None or (self.says_when and isinstance(self.error, UnavailableError | CapacityError))
