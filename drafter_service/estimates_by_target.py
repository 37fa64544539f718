"""What is learned about acceptance, apart for each base model that this drafter serves."""

from __future__ import annotations

from collections import OrderedDict

from drafter_service.acceptance_estimate import AcceptanceEstimate

# Far more base models than one drafter serves, and few enough that fingerprints made up by a client cost little memory.
_MAX_TARGETS = 32


class EstimatesByTarget:
    """An estimate per base model, made when it is first asked for; beyond `max_targets` the one unused for longest is
    forgotten. A base model that guesses suit well says nothing about how well they suit another."""

    def __init__(self, max_targets: int = _MAX_TARGETS) -> None:
        self._max_targets = max_targets
        self._estimates: OrderedDict[str, AcceptanceEstimate] = OrderedDict()

    def of(self, target: str) -> AcceptanceEstimate:
        """The estimate for the base model `target`; sessions may keep it for as long as they live."""
        estimate = self._estimates.pop(target, None) or AcceptanceEstimate()
        self._estimates[target] = estimate
        if len(self._estimates) > self._max_targets:
            self._estimates.popitem(last=False)
        return estimate
