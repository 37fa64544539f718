"""What is learned about rounds, apart for each base model, and for greedy and sampled requests."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate
from drafter_service.worth import Choice, Option, TokenTime, Trial

# Expected tokens of a round of text, from which the classes of the model's gain begin: copied text is drafted as well
# by text alone, in a fraction of the time.
_CLASS_BOUNDS = (1.5, 2.5, 4.0, 6.0, 9.0)


@dataclass(frozen=True)
class Rounds:
    """What is known of rounds of one kind; numbers about rounds only."""

    token_time: TokenTime = field(default_factory=TokenTime)
    model: tuple[Option, ...] = field(default_factory=lambda: tuple(Option() for _ in range(len(_CLASS_BOUNDS) + 1)))
    text: Option = field(default_factory=Option)
    ahead: Trial = field(default_factory=Trial)

    def model_beside(self, expected_of_text: float) -> Option:
        """The model in a round of which text expects so many tokens, the bonus token among them."""
        return self.model[bisect.bisect_right(_CLASS_BOUNDS, expected_of_text)]


@dataclass(frozen=True)
class Learned:
    """What is known of one base model."""

    estimate: AcceptanceEstimate = field(default_factory=AcceptanceEstimate)
    greedy: Rounds = field(default_factory=Rounds)
    sampled: Rounds = field(default_factory=Rounds)

    def rounds(self, *, is_greedy: bool) -> Rounds:
        return self.greedy if is_greedy else self.sampled


class RoundChoices:
    """Who takes part in the rounds of one request."""

    def __init__(self, shared: Rounds) -> None:
        self.shared = shared
        self.token_time = TokenTime(shared.token_time)
        self._model = Choice()
        self._text = Choice()

    def is_model_worth_it(self, expected_of_text: float) -> bool:
        """Whether to ask the model in a round of which text alone expects so many tokens."""
        option = self.shared.model_beside(expected_of_text)
        price_s = max((each.time_s for each in self.shared.model), key=lambda each: each.count).value
        return self._model.is_worth_it(option, self.token_time.seconds, price_s)

    def is_text_worth_it(self, num_sharing: int) -> bool:
        """Whether to ask text in the next round; `num_sharing` requests share this thread, and wait for its work."""
        option = self.shared.text
        return self._text.is_worth_it(option, self.token_time.seconds, num_sharing * option.time_s.value)

    def observe_model(self, expected_of_text: float, gain: float, time_s: float) -> None:
        """A round with the model came to `gain` tokens more than text alone would have; it took so long."""
        option = self.shared.model_beside(expected_of_text)
        self._model.observe(option, gain)
        option.time_s.add(time_s)

    def observe_text(self, gain: float, time_s: float) -> None:
        """A round with text came to `gain` tokens more than the model alone would have; it took so long."""
        self._text.observe(self.shared.text, gain)
        self.shared.text.time_s.add(time_s)
