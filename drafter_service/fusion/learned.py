"""What is learned about rounds, apart for each base model, and for greedy and sampled requests."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate
from drafter_service.worth import Choice, Option, TokenTime, Trial

# Expected tokens of a round of text, from which the kinds of rounds begin that the model joins: copied text is drafted
# as well by text alone, in a fraction of the time.
_KIND_BOUNDS = (1.5, 2.5, 4.0, 6.0, 9.0)


def kind_of_round(expected_of_text: float) -> int:
    """The kind of a round of which text expects so many tokens, the bonus token among them."""
    return bisect.bisect_right(_KIND_BOUNDS, expected_of_text)


class Shared:
    """What is known of the rounds of greedy, or of sampled requests; numbers about rounds only."""

    def __init__(self) -> None:
        self.token_time = TokenTime()
        self.model = [Option() for _ in range(len(_KIND_BOUNDS) + 1)]
        self.text = [Option()]
        self.ahead = Trial()


class RoundChoices:
    """Who takes part in the rounds of one request."""

    def __init__(self, shared: Shared) -> None:
        self.token_time = TokenTime(shared.token_time)
        self.model = Choice(shared.model, self.token_time)
        self.text = Choice(shared.text, self.token_time)
        self.ahead = shared.ahead


@dataclass(frozen=True)
class Learned:
    """What is known of one base model."""

    estimate: AcceptanceEstimate = field(default_factory=AcceptanceEstimate)
    greedy: Shared = field(default_factory=Shared)
    sampled: Shared = field(default_factory=Shared)

    def choices(self, *, is_greedy: bool) -> RoundChoices:
        """Those of a new request."""
        return RoundChoices(self.greedy if is_greedy else self.sampled)
