"""Guessing from text alone, without a model: the request's own text, a corpus index, n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from drafter_service.guesser import Guesser, PathGuesser, Stated
from drafter_service.text.common_tokens import CommonTokens, FavouredTokens
from drafter_service.text.datastore import Datastore, Found, TrieNode, predict_in_trie
from drafter_service.text.memory import TextMemory
from drafter_service.text.ngram import AdaptiveNgrams
from drafter_service.text.own_text import OwnText
from drafter_service.text.prediction import ALONE, BESIDE_A_MODEL, MIN_TEMPERATURE, Breadth, Prediction, coupled
from drafter_service.text.suffix_automaton import Place
from easyspec.datastore.ngram_table import NgramTable
from easyspec.datastore.suffix_index import SuffixIndex
from easyspec.speculation.host_noise import HostNoise, PositionNoise
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sources import MODEL_SOURCES, DraftSources

_CONTEXT_TOKENS = 32
_NUM_COMMON_TOKENS = 4096


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


class RoundNoise:
    """The verifier's noise at the levels of one round; level 1 is chosen at position `base_length`."""

    def __init__(self, noise: HostNoise, base_length: int) -> None:
        self._noise = noise
        self._base_length = base_length
        self._levels: dict[int, PositionNoise] = {}

    def level(self, depth: int) -> PositionNoise:
        """The noise of a level's choice."""
        noise = self._levels.get(depth)
        if noise is None:
            noise = self._levels[depth] = self._noise.at(self._base_length + depth - 1)
        return noise


class TextDrafting:
    """One request's text, as those of its `sources` that read text see it. Holds nothing of any other request."""

    def __init__(self, resources: TextResources, sources: DraftSources, sampling: SamplingParameters) -> None:
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

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take up committed tokens."""
        most_tokens = self._memory.most_tokens
        if self._own is not None:
            self._own.max_tokens = most_tokens
            self._own.extend(token_ids)
        if self._ngrams is not None:
            self._ngrams.max_contexts = most_tokens // 2
            self._ngrams.extend(token_ids)
        self._recent = [*self._recent, *token_ids[-_CONTEXT_TOKENS:]][-_CONTEXT_TOKENS:]

    def guessers(self, base_length: int) -> list[PathGuesser]:
        """Every guesser that has a guess after the `base_length` committed tokens; looks things up."""
        coupling = _Coupling(self._sampling, RoundNoise(self._noise, base_length), self._breadth)
        guessers: list[PathGuesser] = []
        if self._own is not None:
            guessers.append(_OwnTextGuesser(self._own, coupling))
        found = self._datastore.look_up(self._recent) if self._datastore is not None else None
        if found is not None:
            guessers.append(_DatastoreGuesser(found, coupling))
        if self._ngrams is not None:
            favoured = None
            if self._common_tokens is not None:
                temperature = max(self._sampling.temperature, MIN_TEMPERATURE)
                favoured = FavouredTokens(self._common_tokens, temperature, coupling.noise.level)
            guessers.append(_NgramGuesser(self._ngrams, coupling, favoured))
        return guessers


@dataclass(frozen=True)
class _Coupling:
    """Turns what a guesser expects into what the verifier will choose, knowing the noise."""

    sampling: SamplingParameters
    noise: RoundNoise
    breadth: Breadth

    def __call__(self, prediction: Prediction | None, depth: int) -> Stated | None:
        if prediction is None:
            return None
        probabilities = coupled(prediction, self.sampling, self.noise.level(depth), self.breadth)
        return Stated(probabilities, prediction.evidence)


class _OwnTextGuesser:
    kind = Guesser.OWN_TEXT

    def __init__(self, text: OwnText, coupling: _Coupling) -> None:
        self._text, self._coupling = text, coupling

    def root(self) -> object | None:
        return self._text.end()

    def step(self, cursor: object, token_id: int) -> object | None:
        assert isinstance(cursor, Place)
        return self._text.step(cursor, token_id)

    def state(self, cursor: object, depth: int) -> Stated | None:
        assert isinstance(cursor, Place)
        return self._coupling(self._text.predict(cursor), depth)


class _DatastoreGuesser:
    kind = Guesser.DATASTORE

    def __init__(self, found: Found, coupling: _Coupling) -> None:
        self._found, self._coupling = found, coupling

    def root(self) -> object | None:
        return self._found.root

    def step(self, cursor: object, token_id: int) -> object | None:
        assert isinstance(cursor, TrieNode)
        return cursor.child(token_id)

    def state(self, cursor: object, depth: int) -> Stated | None:
        assert isinstance(cursor, TrieNode)
        return self._coupling(predict_in_trie(cursor, self._found.evidence), depth)


class _NgramGuesser:
    kind = Guesser.NGRAM

    def __init__(self, ngrams: AdaptiveNgrams, coupling: _Coupling, favoured: FavouredTokens | None) -> None:
        self._ngrams, self._coupling, self._favoured = ngrams, coupling, favoured

    def root(self) -> object | None:
        return self._ngrams.end()

    def step(self, cursor: object, token_id: int) -> object | None:
        assert isinstance(cursor, tuple)
        return self._ngrams.step(cursor, token_id)

    def state(self, cursor: object, depth: int) -> Stated | None:
        assert isinstance(cursor, tuple)
        prediction = self._ngrams.predict(cursor)
        if self._favoured is not None:
            prediction = self._favoured.beside(prediction, depth)
        return self._coupling(prediction, depth)
