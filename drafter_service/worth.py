"""What takes part in a round: whatever brings more time than it takes.

One rule for all: an option (the draft model, text, n-grams, the next exit, a level of a tree, a node) is taken if the
extra tokens expected of it, times what a token's time is worth at present, are more than the time it takes. What tokens
are worth is the time that they take in this request of late, drafting, verifying and waiting together: at the best rate
of tokens per second nothing that is left out would have been worth more than its time. Text is held against the
draft model alone, as what becomes of its rounds: where it drafts alone, the time that the model would have taken counts
for it.

What an option brings is learned from verdicts, as numbers about rounds, never about tokens. An option that is left out
is tried again whenever rounds of a kind without it have taken a hundred times what trying it may lose: the later the
further it is from paying, and together for requests that are too short to do so themselves.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from drafter_service.guesser import NUM_EVIDENCE_CLASSES
from easyspec.engine.average import MAX_OUTLIER, Average, clock_average

# Gains of single rounds scatter by more than they are worth, and are followed slowly.
GAIN_RATE = 0.02
# Rounds of a kind, of any request, before anything is believed of an option.
_MIN_ROUNDS = 2
# What is known of other requests counts as so many rounds of this one, whose own count less as they get older.
_PRIOR_ROUNDS, _KEPT = 6, 0.98
# The worth of a token follows over some twenty rounds: a phase of copying does not make it worthless.
_TOKEN_TIME_RATE = 0.05
# Expected tokens of a round of text, from which the kinds of rounds begin that the model joins: copied text is drafted
# as well by text alone, in a fraction of the time.
KIND_BOUNDS = (1.5, 2.5, 4.0, 6.0, 9.0)
# A kind's own average counts half when it knows so many rounds.
_LIKE_OTHERS = 4.0
# For so much of the time that rounds take without an option, it is tried although it does not pay.
_TRYING_SHARE = 0.01
# The time of a row follows slowly: it is small beside the pauses of a machine. Trees must differ in size to tell it:
# with this variance of sizes, half of it is believed.
_ROW_TIME_RATE, _MIN_ROW_ROUNDS, _SIZE_VARIANCE = 0.01, 12, 1.0
# Nodes worth more than this are sent whatever a few rounds say of rows.
_MOST_LEAST_VALUE = 0.4
# Kinds of rounds for text: nothing was retrieved, or with evidence of a class.
NUM_TEXT_KINDS = 1 + NUM_EVIDENCE_CLASSES
# A trial goes by blocks of rounds, so many of each kind at first, and then one of the other kind in so many.
_BLOCK_ROUNDS, _MIN_BLOCKS, _RETRIAL_BLOCKS = 8, 2, 16
# Far more base models than one drafter serves, and few enough that fingerprints made up by a client cost little memory.
_MAX_TARGETS = 32

KnownT = TypeVar("KnownT")


class TokenTime:
    """What a token's time is worth to one request, in seconds, beginning with what it is to others like it."""

    def __init__(self, shared: TokenTime | None = None) -> None:
        self._shared = shared
        self._round_s: Average = Average(_TOKEN_TIME_RATE, MAX_OUTLIER)
        self._num_tokens: Average = Average(_TOKEN_TIME_RATE)
        if shared is not None:
            for own, known in ((self._round_s, shared._round_s), (self._num_tokens, shared._num_tokens)):
                own.value, own.count = known.value, min(_PRIOR_ROUNDS, known.count)

    @property
    def seconds(self) -> float | None:
        """None before any round is known."""
        return self._round_s.value / self._num_tokens.value if self._round_s.count else None

    @property
    def round_s(self) -> float:
        """What a round takes, 0 before any is known."""
        return self._round_s.value

    def observe(self, round_s: float, num_tokens: int) -> None:
        """A round took so long, verifier and wire included, and came to so many tokens."""
        self._round_s.add(round_s)
        self._num_tokens.add(num_tokens)
        if self._shared is not None:
            self._shared.observe(round_s, num_tokens)


class RowTime:
    """How much longer rounds take for each node that they send: the slope of a line through rounds of late.

    It is measured where it is paid, verifier, its batches and the wire together, on whatever machine they run.
    """

    def __init__(self) -> None:
        self._averages = [Average(_ROW_TIME_RATE) for _ in range(4)]
        self._usual_s = clock_average()

    def observe(self, num_nodes: int, away_s: float) -> None:
        """A tree of so many nodes was answered after so long."""
        self._usual_s.add(away_s)
        seconds = min(away_s, MAX_OUTLIER * self._usual_s.value)
        for average, number in zip(
            self._averages, (num_nodes, seconds, num_nodes**2, num_nodes * seconds), strict=True
        ):
            average.add(number)

    @property
    def seconds(self) -> float:
        """0 before enough rounds are known; cautious while their trees hardly differ in size."""
        num_nodes, away_s, squares, products = (average.value for average in self._averages)
        if self._averages[0].count < _MIN_ROW_ROUNDS:
            return 0.0
        return max(0.0, (products - num_nodes * away_s) / (squares - num_nodes**2 + _SIZE_VARIANCE))


class AverageByKind:
    """Averages of rounds of several kinds; a kind of which little is known is taken for like the others."""

    def __init__(self, num_kinds: int, make: Callable[[], Average]) -> None:
        self._overall = make()
        self._kinds = [make() for _ in range(num_kinds)]

    def count(self, kind: int) -> int:
        """Numbers of a kind."""
        return self._kinds[kind].count

    def of(self, kind: int) -> float:
        """What is to be expected of a round of a kind."""
        overall, own = self._overall.value, self._kinds[kind]
        return overall + (own.value - overall) * own.count / (own.count + _LIKE_OTHERS)

    def add(self, kind: int, number: float) -> None:
        """One number more."""
        self._overall.add(number)
        self._kinds[kind].add(number)


class Option:
    """One source over all requests, by kinds of rounds: the extra tokens of a round that it takes part in, what it
    takes, and how much time may be lost by trying it although it does not pay."""

    def __init__(self, num_kinds: int = 1) -> None:
        self.gain = AverageByKind(num_kinds, lambda: Average(GAIN_RATE))
        self.time_s = AverageByKind(num_kinds, clock_average)
        self.trying_s = [0.0] * num_kinds


class Choice:
    """Whether one source takes part in the rounds of one request, and what came of it."""

    def __init__(self, option: Option, token_time: TokenTime) -> None:
        self.option = option
        self._token_time = token_time
        self._excess = 0.0  # gains of this request's rounds, less those of other requests
        self._weight = 0.0

    def is_worth_it(self, kind: int = 0, num_sharing: int = 1) -> bool:
        """Whether it takes part in the next round, which is of a `kind`; `num_sharing` requests wait for its work."""
        option, token_s = self.option, self._token_time.seconds
        if option.gain.count(kind) < _MIN_ROUNDS or token_s is None:
            return True
        gain = option.gain.of(kind) + self._excess / (_PRIOR_ROUNDS + self._weight)
        loss_s = num_sharing * option.time_s.of(kind) - max(0.0, gain) * token_s
        if loss_s > 0.0:
            option.trying_s[kind] += _TRYING_SHARE * self._token_time.round_s
            if option.trying_s[kind] < loss_s:
                return False
            option.trying_s[kind] = 0.0
        return True

    def observe(self, gain: float, time_s: float, kind: int = 0) -> None:
        """A round came to `gain` tokens more than it would have without, and took so much longer."""
        option = self.option
        option.gain.add(kind, gain)
        option.time_s.add(kind, time_s)
        self._excess = _KEPT * self._excess + gain - option.gain.of(kind)
        self._weight = _KEPT * self._weight + 1.0


class Trial:
    """Whether something pays that shows only in how long rounds take, on this machine at this load: in turns with and
    without for a while, then what took less time a token, and the other one again now and then."""

    def __init__(self) -> None:
        self.is_on = True
        self._s_per_token = {True: clock_average(), False: clock_average()}
        self._seconds, self._num_tokens, self._num_rounds, self._num_blocks = 0.0, 0, 0, 0

    def observe(self, *, was_on: bool, round_s: float, num_tokens: int) -> None:
        """A round took so long and came to so many tokens."""
        if was_on != self.is_on:
            return
        self._num_rounds += 1
        if self._num_rounds > 1:  # the first has something of both
            self._seconds += round_s
            self._num_tokens += num_tokens
        if self._num_rounds <= _BLOCK_ROUNDS:
            return
        self._s_per_token[self.is_on].add(self._seconds / self._num_tokens)
        self._seconds, self._num_tokens, self._num_rounds = 0.0, 0, 0
        self._num_blocks += 1
        on, off = self._s_per_token[True], self._s_per_token[False]
        is_better_on = on.value <= off.value
        if min(on.count, off.count) < _MIN_BLOCKS:
            self.is_on = not self.is_on
        else:
            self.is_on = is_better_on != (self._num_blocks % _RETRIAL_BLOCKS == 0)


class ModelAlone:
    """What rounds of the draft model alone come to, by text's kinds of rounds, and what the model takes."""

    def __init__(self) -> None:
        self._num_tokens = AverageByKind(NUM_TEXT_KINDS, lambda: Average(GAIN_RATE))
        self._model_s = clock_average()

    def observe(self, kind: int, num_tokens: int, model_s: float) -> None:
        """A round had come to so many tokens."""
        self._num_tokens.add(kind, num_tokens)
        self._model_s.add(model_s)

    def worth(self, kind: int, token_time: TokenTime) -> float:
        """Its tokens, less those that its time would have brought."""
        return self._num_tokens.of(kind) - self._model_s.value / (token_time.seconds or math.inf)


class RoundChoices:
    """Who takes part in the rounds of one request, beginning with what is known of others like it: `shared`, which is
    another of these that no request has. Rounds are of a kind for text, and n-grams, by what was retrieved, and for the
    model by how much text expects."""

    def __init__(self, shared: RoundChoices | None = None) -> None:
        self.token_time: TokenTime = TokenTime(shared.token_time if shared else None)
        of_model = shared.model.option if shared else Option(len(KIND_BOUNDS) + 1)
        self.model: Choice = Choice(of_model, self.token_time)
        self.text: Choice = Choice(shared.text.option if shared else Option(NUM_TEXT_KINDS), self.token_time)
        self.ngrams: Choice = Choice(shared.ngrams.option if shared else Option(NUM_TEXT_KINDS), self.token_time)
        self.model_alone: ModelAlone = shared.model_alone if shared else ModelAlone()
        self.ahead: Trial = shared.ahead if shared else Trial()
        self.row_time: RowTime = shared.row_time if shared else RowTime()

    @property
    def least_node_value(self) -> float:
        """From what probability of being accepted on a node is worth its row at the verifier."""
        least = self.row_time.seconds / (self.token_time.seconds or math.inf)
        return min(least, _MOST_LEAST_VALUE)


class ByTarget(Generic[KnownT]):
    """What is known about each base model, made when it is first asked for; beyond `max_targets` the one unused for
    longest is forgotten. A base model that guesses suit well says nothing about how well they suit another."""

    def __init__(self, make: Callable[[], KnownT], max_targets: int = _MAX_TARGETS) -> None:
        self._make = make
        self._max_targets = max_targets
        self._known: OrderedDict[str, KnownT] = OrderedDict()

    def of(self, target: str) -> KnownT:
        """What is known of the base model `target`; sessions may keep it for as long as they live."""
        known = self._known.pop(target, None) or self._make()
        self._known[target] = known
        if len(self._known) > self._max_targets:
            self._known.popitem(last=False)
        return known
