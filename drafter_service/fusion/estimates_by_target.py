"""What is learned about acceptance, apart for each base model that this drafter serves."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate
from drafter_service.fusion.model_use import ModelGains
from drafter_service.fusion.text_use import TextGains

# Far more base models than one drafter serves, and few enough that fingerprints made up by a client cost little memory.
_MAX_TARGETS = 32


@dataclass(frozen=True)
class Gains:
    """What the model and text have brought in rounds that either could draft alone."""

    of_model: ModelGains = field(default_factory=ModelGains)
    of_text: TextGains = field(default_factory=TextGains)


@dataclass(frozen=True)
class _Learned:
    estimate: AcceptanceEstimate = field(default_factory=AcceptanceEstimate)
    greedy: Gains = field(default_factory=Gains)
    sampled: Gains = field(default_factory=Gains)


class EstimatesByTarget:
    """An estimate per base model, made when it is first asked for; beyond `max_targets` the one unused for longest is
    forgotten. A base model that guesses suit well says nothing about how well they suit another."""

    def __init__(self, max_targets: int = _MAX_TARGETS) -> None:
        self._max_targets = max_targets
        self._learned: OrderedDict[str, _Learned] = OrderedDict()

    def of(self, target: str) -> AcceptanceEstimate:
        """The estimate for the base model `target`; sessions may keep it for as long as they live."""
        return self._learned_of(target).estimate

    def gains_of(self, target: str, *, is_greedy: bool) -> Gains:
        """What is known of greedy, or of sampled, requests to that base model; to be kept as long."""
        learned = self._learned_of(target)
        return learned.greedy if is_greedy else learned.sampled

    def _learned_of(self, target: str) -> _Learned:
        learned = self._learned.pop(target, None) or _Learned()
        self._learned[target] = learned
        if len(self._learned) > self._max_targets:
            self._learned.popitem(last=False)
        return learned
