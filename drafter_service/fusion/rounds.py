"""The rounds of sessions: which sources take part in each, and the one tree that comes of it."""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

from drafter_service.fusion.union import FusedTree, fuse, learn
from drafter_service.guesser import NUM_EVIDENCE_CLASSES, Guesser, PathGuesser, Stated
from drafter_service.session import NOTHING_SENT, Round, Session
from drafter_service.worth import KIND_BOUNDS
from easyspec.speculation.growing_tree import follow, num_followed
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import ScoredTree, TokenTree

# Text names far more than is worth anything.
_LEAST_TEXT_VALUE = 0.002
# A node's evidence is the exit that named it, 0 being all layers: shallow exits are right less often.
_WHOLE_MODEL = 0
Sources: TypeAlias = tuple[DraftSources, ...]


class ModelGuesser:
    """A PathGuesser, as text is, over a tree that the draft model has grown; a cursor is a row of it.

    The tree's values contain the noise already. Rows that were not expanded have nothing to say. `early_rows` are those
    whose children an early exit named, and which.
    """

    kind = Guesser.MODEL

    def __init__(self, scored: ScoredTree, early_rows: Mapping[int, int] = MappingProxyType({})) -> None:
        self.scored = scored
        self._tree = scored.tree
        self._log_values = scored.log_values
        self._early_rows = early_rows

    def root(self) -> int | None:
        return 0 if len(self._tree) else None

    def step(self, cursor: int, token_id: int) -> int | None:
        return self._tree.child(cursor, token_id)

    def state(self, cursor: int, depth: int) -> Stated | None:
        children = self._tree.children[cursor]
        if not children:
            return None
        value = self._log_values[cursor - 1] if cursor else 0.0
        evidence = min(self._early_rows.get(cursor, _WHOLE_MODEL), NUM_EVIDENCE_CLASSES - 1)
        return Stated(
            {token_id: math.exp(self._log_values[row - 1] - value) for token_id, row in children.items()}, evidence
        )

    def told_apart(self, tree: TokenTree, node_sources: Sequence[DraftSources]) -> tuple[DraftSources, ...]:
        """`node_sources` of `tree` with those of the model's nodes that an early exit named named after it."""
        if not self._early_rows:
            return tuple(node_sources)
        model_rows: list[int | None] = [0]
        named = []
        for token_id, parent_row, sources in zip(tree.token_ids, tree.parent_rows, node_sources, strict=True):
            above = model_rows[parent_row]
            model_rows.append(self._tree.child(above, token_id) if above is not None else None)
            if DraftSources.MODEL in sources and above in self._early_rows:
                sources = sources & ~DraftSources.MODEL | DraftSources.EARLY_EXIT
            named.append(sources)
        return tuple(named)


class Rounds:
    """Begins and ends rounds. Rounds that text alone drafts at a better rate are drafted by text alone, and those in
    which text brings less than its work costs by the model alone (`drafter_service/worth.py`); the model catches up in
    the next round that it takes part in. n-grams join what is retrieved where they pay, and nodes are sent that are
    worth their rows. With `asks_all_sources` no round leaves a source out, or a node for what its row takes.
    """

    def __init__(self, *, asks_all_sources: bool = False, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._asks_all = asks_all_sources
        self._clock_ns = clock_ns

    def begin(self, session: Session, num_new_tokens: int, budget: TreeBudget, num_sharing: int) -> Round:
        """Learn from the verdict on the last round, and choose the sources of the next; text looks things up.

        `num_sharing` sessions share the thread.
        """
        last, now_ns = session.round, self._clock_ns()
        if last is not None:
            self._learn(session, last, session.token_ids[-num_new_tokens:], now_ns)
        asks_model, text, choices = session.request.asks_model, session.text, session.choices
        least_value = 0.0 if self._asks_all else choices.least_node_value
        session.round = round_ = Round(budget, now_ns, least_value, asks_model, text is not None, looked_up_ns=now_ns)
        if text is None:
            return round_
        round_.guessers = text.guessers()
        round_.text_kind = _kind_for_text(round_.guessers)
        round_.looked_up_ns = self._clock_ns()
        if asks_model and not self._asks_all:
            round_.has_text = choices.text.is_worth_it(round_.text_kind, num_sharing)
        if not round_.has_text:
            return round_
        retrieval = [guesser for guesser in round_.guessers if guesser.kind is not Guesser.NGRAM]
        if 0 < len(retrieval) < len(round_.guessers):
            round_.adds_ngrams = self._asks_all or choices.ngrams.is_worth_it(round_.text_kind, num_sharing)
            round_.guessers = round_.guessers if round_.adds_ngrams else retrieval
        if asks_model:
            round_.text_tree = self.fuse(session, round_, None)
            # Tokens that the round of text may be expected to come to, the bonus token among them.
            expected = 1.0 + sum(math.exp(value) for value in round_.text_tree.scored.log_values)
            round_.kind = bisect.bisect_right(KIND_BOUNDS, expected)
            round_.has_model = self._asks_all or choices.model.is_worth_it(round_.kind)
        round_.text_ns = self._clock_ns() - round_.looked_up_ns
        return round_

    def _learn(self, session: Session, last: Round, said: list[int], now_ns: int) -> None:
        choices, num_tokens, round_s = session.choices, len(said), (now_ns - last.begun_ns) / 1e9
        choices.token_time.observe(round_s, num_tokens)
        if last.sent_ns and num_tokens <= last.sent.tree.num_levels + 1:  # else there were plain rounds between
            choices.row_time.observe(len(last.sent.tree), (now_ns - last.sent_ns) / 1e9)
        if last.has_model:
            choices.ahead.observe(was_on=last.went_ahead, round_s=round_s, num_tokens=num_tokens)
        if last.fused is not None:
            learn(last.fused, said, session.judge)
            if last.adds_ngrams:
                gain = num_tokens - _tokens_without_ngrams(last.fused, said)
                choices.ngrams.observe(gain, last.ngram_ns / 1e9, last.text_kind)
        model_alone, text_s = choices.model_alone, (last.text_ns + last.fuse_ns) / 1e9
        if last.model_tree is not None:
            num_by_model = _tokens_by(last.model_tree.tree, said)
            model_alone.observe(last.text_kind, num_by_model, last.model_ns / 1e9)
            if last.text_tree is not None:
                num_by_text = _tokens_by(last.text_tree.scored.tree, said)
                choices.model.observe(num_tokens - num_by_text, (last.model_ns + last.fuse_ns) / 1e9, last.kind)
                choices.text.observe(num_tokens - num_by_model, text_s, last.text_kind)
        elif last.text_tree is not None:
            instead = model_alone.worth(last.text_kind, choices.token_time)
            choices.text.observe(num_tokens - instead, text_s, last.text_kind)

    def finish(self, session: Session) -> tuple[TokenTree, Sources]:
        """The round's tree within its budget, and the sources of each node."""
        round_ = session.round
        assert round_ is not None, "a round is under way"
        begun_ns = self._clock_ns()
        model = None
        if round_.has_model and session.model is not None:
            exits = session.model.exits
            model = ModelGuesser(session.model.growing.scored(), {} if exits is None else exits.early_rows)
            least_log_value = math.log(round_.least_value) if round_.least_value else -math.inf
            round_.model_tree = model.scored.pruned(round_.budget.num_nodes, least_log_value)
            round_.model_ns = begun_ns - round_.looked_up_ns - round_.text_ns
        if not round_.has_text:
            round_.sent = round_.model_tree or NOTHING_SENT
            node_sources: Sources = (DraftSources.MODEL,) * len(round_.sent.tree)
        else:
            fused = round_.text_tree if model is None else None
            round_.fused = fused = fused or self.fuse(session, round_, model)
            round_.sent, node_sources = fused.scored, fused.node_sources
        if model is not None:
            node_sources = model.told_apart(round_.sent.tree, node_sources)
        round_.sent_ns = self._clock_ns()
        round_.fuse_ns = round_.sent_ns - begun_ns
        return round_.sent.tree, node_sources

    def fuse(self, session: Session, round_: Round, model: ModelGuesser | None) -> FusedTree:
        """The tree of all guesses: of text, and of the draft model's tree where it takes part."""
        guessers = [*([] if model is None else [model]), *round_.guessers]
        preference, committed = session.request.preference, session.token_ids
        allowed_after = None if preference is None else lambda path: preference.allowed_after(committed, [path])[0]
        num_nodes, least_value = round_.budget.num_nodes, max(round_.least_value, _LEAST_TEXT_VALUE)
        fused = fuse(guessers, session.judge, num_nodes, least_value, allowed_after, self._clock_ns)
        round_.ngram_ns += fused.ngram_ns
        return fused


def _tokens_by(tree: TokenTree, said: list[int]) -> int:
    """How many of the tokens `said` a round with `tree` would have brought."""
    return min(num_followed(tree, said) + 1, len(said))


def _tokens_without_ngrams(fused: FusedTree, said: list[int]) -> int:
    """How many of the tokens `said` a round would have brought without the nodes that n-grams alone named."""
    rows = [row for row, _, _ in follow(fused.scored.tree, said)]
    kept = itertools.takewhile(lambda row: row == 0 or fused.node_sources[row - 1] != DraftSources.NGRAM, rows)
    return min(sum(1 for _ in kept), len(said))


def _kind_for_text(guessers: Sequence[PathGuesser]) -> int:
    """0 where nothing was retrieved, otherwise 1 and the class of the evidence for it."""
    kind = 0
    for guesser in guessers:
        if guesser.kind is not Guesser.NGRAM and (cursor := guesser.root()) is not None:
            said = guesser.state(cursor, 1)
            kind = max(kind, 0 if said is None else 1 + said.evidence)
    return kind
