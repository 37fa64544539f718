"""Guessing from text alone, without a model: the request's own text, a corpus index, n-grams."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Protocol

import numpy as np

from drafter_service.guesser import Guesser, PathGuesser, Stated
from drafter_service.text.datastore import Datastore
from drafter_service.text.ngram import AdaptiveNgrams
from drafter_service.text.own_text import OwnText
from drafter_service.text.prediction import ALONE, BESIDE_A_MODEL, MIN_TEMPERATURE, CommonTokens, beside, coupled
from easyspec.datastore.ngram_table import NgramTable
from easyspec.datastore.suffix_index import SuffixIndex
from easyspec.speculation.host_noise import HostNoise, PositionNoise
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sources import MODEL_SOURCES, DraftSources

_CONTEXT_TOKENS = 32
_READ_TOKENS = 2048
_NUM_COMMON_TOKENS = 4096
# What a token of a request's own text takes, measured on random ones: 420 bytes in the automaton, 950 in the n-gram
# tables, which keep half as many contexts of each order.
TOKEN_BYTES = 1_400
_MOST_TOKENS, _LEAST_TOKENS = 32_768, 512
_DEFAULT_BYTES = 1 << 30


class TextMemory:
    """A budget that open requests share: each may keep as many tokens as fit, fewer the more requests there are."""

    def __init__(self, num_bytes: int = _DEFAULT_BYTES) -> None:
        self._num_tokens = num_bytes // TOKEN_BYTES
        self._requests: weakref.WeakSet[object] = weakref.WeakSet()

    def join(self, request: object) -> None:
        """One more takes part, as long as the object lives."""
        self._requests.add(request)

    @property
    def most_tokens(self) -> int:
        """What a request may keep now."""
        share = self._num_tokens // max(1, len(self._requests))
        return min(_MOST_TOKENS, max(_LEAST_TOKENS, share))


@dataclass(frozen=True)
class TextResources:
    """What all requests read from, and the memory that they share."""

    index: SuffixIndex | None = None
    prior: NgramTable | None = None
    memory: TextMemory = field(default_factory=TextMemory)

    @cached_property
    def common_tokens(self) -> CommonTokens | None:
        """Of the corpus that the table is of."""
        token_ids, shares = self.prior.commonest(_NUM_COMMON_TOKENS) if self.prior is not None else ((), ())
        return CommonTokens(np.asarray(token_ids), np.asarray(shares)) if len(token_ids) else None


NO_RESOURCES = TextResources()


class TextSource(Protocol):
    """Text that predicts. A cursor is a place in it; it knows nothing of noise."""

    def end(self) -> Any | None:
        """Where the committed text stands; None if there is nothing to say."""

    def step(self, cursor: Any, token_id: int) -> Any | None:
        """One token further; None if there is nothing to say from there on."""

    def predict(self, cursor: Any) -> Stated | None:
        """What follows; None if it does not know."""


@dataclass(frozen=True)
class TextGuesser:
    """A PathGuesser over text: turns what is expected at a level into what the verifier will choose, by `couple`.

    `favoured` has the common tokens of a level, where they stand beside what text says.
    """

    kind: Guesser
    source: TextSource
    couple: Callable[[Stated, int], dict[int, float]]
    favoured: Callable[[int], Mapping[int, float]] | None = None

    def root(self) -> Any | None:
        return self.source.end()

    def step(self, cursor: Any, token_id: int) -> Any | None:
        return self.source.step(cursor, token_id)

    def state(self, cursor: Any, depth: int) -> Stated | None:
        said = self.source.predict(cursor)
        if self.favoured is not None:
            said = beside(said, self.favoured(depth))
        return None if said is None else Stated(self.couple(said, depth), said.evidence)


class TextDrafting:
    """One request's text, as those of its `sources` that read text see it. Holds nothing of any other request.

    `token_ids` are its committed tokens, which it does not extend; what they grow by is read when it is asked for.
    """

    def __init__(
        self, resources: TextResources, sources: DraftSources, sampling: SamplingParameters, token_ids: Sequence[int]
    ) -> None:
        self._token_ids = token_ids
        self._num_prompt_tokens = len(token_ids)
        self.num_read = 0
        self._memory = resources.memory
        self._memory.join(self)
        self._sampling = sampling
        self._noise = HostNoise(sampling.seed)
        self._own: OwnText | None = None
        self._datastore: Datastore | None = None
        self._ngrams: AdaptiveNgrams | None = None
        if DraftSources.RETRIEVAL in sources:
            self._own = OwnText(self._memory.most_tokens)
            self._datastore = Datastore(resources.index) if resources.index is not None else None
        if DraftSources.NGRAM in sources:
            self._ngrams = AdaptiveNgrams(self._memory.most_tokens // 2, resources.prior)
        # A draft model knows better, wherever it looks.
        has_model = bool(sources & MODEL_SOURCES)
        self._breadth = BESIDE_A_MODEL if has_model else ALONE
        is_blind = not sampling.is_greedy and not has_model
        self._common_tokens = resources.common_tokens if is_blind else None
        self._recent: list[int] = []

    @property
    def has_read_prompt(self) -> bool:
        """Whether all is read that was committed at first."""
        return self.num_read >= self._num_prompt_tokens

    def read(self) -> None:
        """Read a chunk of what is committed."""
        token_ids = self._token_ids[self.num_read : self.num_read + _READ_TOKENS]
        self.num_read += len(token_ids)
        most_tokens = self._memory.most_tokens
        if self._own is not None:
            self._own.max_tokens = most_tokens
            self._own.extend(token_ids)
        if self._ngrams is not None:
            self._ngrams.max_contexts = most_tokens // 2
            self._ngrams.extend(token_ids)
        self._recent = [*self._recent, *token_ids[-_CONTEXT_TOKENS:]][-_CONTEXT_TOKENS:]

    def guessers(self) -> list[PathGuesser]:
        """Every guesser that has a guess after the committed tokens; reads them, and looks things up."""
        base_length = len(self._token_ids)
        while self.num_read < base_length:
            self.read()
        sampling, temperature = self._sampling, max(self._sampling.temperature, MIN_TEMPERATURE)
        common_tokens = self._common_tokens

        @cache
        def noise(depth: int) -> PositionNoise:
            return self._noise.at(base_length + depth - 1)

        @cache
        def favoured(depth: int) -> Mapping[int, float]:
            return common_tokens.favoured(temperature, noise(depth)) if common_tokens is not None else {}

        def couple(said: Stated, depth: int) -> dict[int, float]:
            return coupled(said, sampling, noise(depth), self._breadth)

        found = self._datastore.look_up(self._recent) if self._datastore is not None else None
        sources: list[tuple[Guesser, TextSource | None]] = [
            (Guesser.OWN_TEXT, self._own),
            (Guesser.DATASTORE, found),
            (Guesser.NGRAM, self._ngrams),
        ]
        return [
            TextGuesser(kind, source, couple, favoured if kind is Guesser.NGRAM and common_tokens is not None else None)
            for kind, source in sources
            if source is not None
        ]
