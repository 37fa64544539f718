"""The n-gram guesser (after ADED, arXiv 2407.12021): what follows the last one to three tokens.

Counts of the request's own text, which fade, lie over those of an optional corpus. Every request has counts of its
own, bounded, and nothing of them is left when it ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

from drafter_service.guesser import Stated
from drafter_service.text.prediction import best
from easyspec.datastore.ngram_table import MAX_ORDER, NUM_SUCCESSORS, NgramTable

# Per token: what was seen 700 tokens ago counts half.
_DECAY = 0.999
_RESCALE_AT = 1e100
# One occurrence in the request's own text weighs as much as this many in the corpus, of which at most so many count.
_OWN_WEIGHT = 3.0
_MAX_PRIOR_WEIGHT = 12.0
# Weight of the shorter context's opinion against one observation.
_BACKOFF = 1.5
# What is left open below this is not worth asking a shorter context about.
_MIN_SHARE = 0.1
# Nor is a successor of which a context makes less than this.
_MIN_ADDED = 0.005
# Below this weight the own text's longest context is thin evidence.
_MUCH = 2.0
# Contexts whose successors in the corpus are kept at hand.
_MAX_REMEMBERED = 4096


class AdaptiveNgrams:
    """Counts of one request. `max_contexts` bounds each order; the contexts not seen for longest go first."""

    def __init__(self, max_contexts: int, prior: NgramTable | None) -> None:
        self.max_contexts = max_contexts
        # Rounds ask for the same contexts again and again.
        self._prior = None if prior is None else lru_cache(_MAX_REMEMBERED)(prior.successors)
        self._tables: list[dict[tuple[int, ...], dict[int, float]]] = [{} for _ in range(MAX_ORDER)]
        self._last: tuple[int, ...] = ()
        # Weights are kept in units that grow, instead of fading one by one.
        self._unit = 1.0

    def extend(self, token_ids: Sequence[int]) -> None:
        """Count tokens of the request."""
        for token_id in token_ids:
            self._unit /= _DECAY
            for order in range(1, len(self._last) + 1):
                table, context = self._tables[order - 1], self._last[-order:]
                successors = table.pop(context, None)
                if successors is None:
                    successors = {}
                    while len(table) >= self.max_contexts:
                        del table[next(iter(table))]
                table[context] = successors  # at the end: the latest
                successors[token_id] = successors.get(token_id, 0.0) + self._unit
                if len(successors) > NUM_SUCCESSORS:
                    del successors[min(successors, key=lambda other: (successors[other], other))]
            self._last = self.step(self._last, token_id)
            if self._unit > _RESCALE_AT:
                for counts in itertools.chain.from_iterable(table.values() for table in self._tables):
                    for successor in counts:
                        counts[successor] /= self._unit
                self._unit = 1.0

    def end(self) -> tuple[int, ...]:
        """The context at the end of the text: its last tokens."""
        return self._last

    @staticmethod
    def step(context: tuple[int, ...], token_id: int) -> tuple[int, ...]:
        """The context after one token more."""
        return (*context, token_id)[-MAX_ORDER:]

    def predict(self, context: tuple[int, ...]) -> Stated | None:
        """Successors of the context, each order's counts smoothed by the next shorter one's opinion.

        From the longest context down, each takes its share of what the longer ones leave open.
        """
        probabilities: dict[int, float] = {}
        evidence, share = 0, 1.0
        for order in range(len(context), 0, -1):
            known = context[-order:]
            own = self._tables[order - 1].get(known)
            prior = None if self._prior is None else self._prior(known)
            if own is None and prior is None:
                continue
            own_weight = sum(own.values()) / self._unit if own is not None else 0.0
            prior_weight = min(prior.total, _MAX_PRIOR_WEIGHT) if prior is not None else 0.0
            if not probabilities:
                evidence = order - 1 + (order == MAX_ORDER) * ((own_weight > 0.0) + (own_weight > _MUCH))
            scale = share / (_OWN_WEIGHT * own_weight + prior_weight + _BACKOFF)
            if own is not None:
                unit = scale * _OWN_WEIGHT / self._unit
                for token_id, weight in own.items():
                    probabilities[token_id] = probabilities.get(token_id, 0.0) + unit * weight
            if prior is not None:
                unit = scale * prior_weight / prior.total
                for token_id, count in zip(prior.token_ids, prior.counts, strict=True):
                    if unit * count < _MIN_ADDED:  # the commonest come first
                        break
                    probabilities[token_id] = probabilities.get(token_id, 0.0) + unit * count
            share = _BACKOFF * scale
            if share < _MIN_SHARE:
                break
        return best(probabilities, evidence)
