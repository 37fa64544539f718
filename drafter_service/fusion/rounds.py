"""The rounds of sessions: which sources take part in each, and the one tree that comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from drafter_service.early_exit.provenance import told_apart
from drafter_service.fusion.model_guesses import ModelGuesser
from drafter_service.session import NOTHING_SENT, Round, Session
from easyspec.speculation.growing_tree import num_followed
from easyspec.speculation.parameters import TreeBudget
from easyspec.speculation.sources import DraftSources
from easyspec.speculation.token_tree import ScoredTree, TokenTree

# Of the tree of text alone that is made before the model is asked: enough to tell a copy from a guess. A round that may
# have no more nodes is drafted by it, if the model sits out; with more, what text alone would have come to is
# underestimated by what nodes beyond these bring.
_NUM_TRIAL_NODES = 16
Sources: TypeAlias = tuple[DraftSources, ...]
_NO_ROWS: Mapping[int, int] = MappingProxyType({})


class Rounds:
    """Begins and ends rounds. Rounds that text alone drafts at a better rate are drafted by text alone, and those in
    which text brings less than its work costs by the model alone (`drafter_service/worth.py`); the other catches up in
    the next round that it takes part in. With `asks_all_sources` no round leaves a source out.
    """

    def __init__(self, *, asks_all_sources: bool = False, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._is_everybody_asked = asks_all_sources
        self._clock_ns = clock_ns

    def begin(self, session: Session, num_new_tokens: int, budget: TreeBudget, num_sharing: int) -> Round:
        """Learn from the verdict on the last round, and choose the sources of the next; text looks things up.

        `num_sharing` sessions share the thread.
        """
        last, now_ns = session.round, self._clock_ns()
        if last is not None:
            self._learn(session, last, num_new_tokens, now_ns)
        request, text = session.request, session.text
        has_text = text is not None and self._is_text_asked(session, last, num_sharing)
        session.round = round_ = Round(budget, now_ns, request.asks_model, has_text)
        if text is None or not has_text:
            return round_
        text.begin()
        if request.asks_model:
            round_.text_tree = text.fuse(None, min(budget.num_nodes, _NUM_TRIAL_NODES))
            expected = round_.text_tree.expected_tokens
            round_.has_model = self._is_everybody_asked or session.choices.is_model_worth_it(expected)
        round_.text_ns = self._clock_ns() - now_ns
        return round_

    def _is_text_asked(self, session: Session, last: Round | None, num_sharing: int) -> bool:
        """Whether text takes part; where it drafted the last round alone it goes on."""
        if self._is_everybody_asked or not session.request.asks_model or (last is not None and not last.has_model):
            return True
        return session.choices.is_text_worth_it(num_sharing)

    def _learn(self, session: Session, last: Round, num_new_tokens: int, now_ns: int) -> None:
        said = session.token_ids[-num_new_tokens:]
        round_s = (now_ns - last.begun_ns) / 1e9
        session.choices.token_time.observe(round_s, num_new_tokens)
        if last.has_model:
            session.choices.shared.ahead.observe(was_on=last.went_ahead, round_s=round_s, num_tokens=num_new_tokens)
        if session.text is not None:
            session.text.learn(said)
        if last.text_tree is not None and last.model_tree is not None:
            gain = num_new_tokens - _tokens_by(last.text_tree.tree, said)
            session.choices.observe_model(last.text_tree.expected_tokens, gain, last.model_ns / 1e9)
            gain = num_new_tokens - _tokens_by(last.model_tree, said)
            session.choices.observe_text(gain, last.text_ns / 1e9)

    def finish(self, session: Session, num_layers: int) -> tuple[TokenTree, Sources]:
        """The round's tree within its budget, and the sources of each node.

        Nodes that the draft model guessed before the last of its `num_layers` are named after that.
        """
        round_ = session.round
        assert round_ is not None, "a round is under way"
        begun_ns = self._clock_ns()
        model, early_rows = None, _NO_ROWS
        if round_.has_model and session.model is not None:
            model, early_rows = session.model.growing.scored(), session.model.early_rows(num_layers)
            round_.model_tree = model.pruned(round_.budget.num_nodes)
            round_.model_ns = begun_ns - round_.begun_ns - round_.text_ns
        round_.sent, node_sources = self._tree(session, round_, model, early_rows)
        tree = round_.sent.tree
        if model is not None and early_rows:
            node_sources = told_apart(tree, node_sources, model.tree, early_rows)
        round_.text_ns += self._clock_ns() - begun_ns if round_.has_text else 0
        return tree, node_sources

    def _tree(
        self, session: Session, round_: Round, model: ScoredTree | None, early_rows: Mapping[int, int]
    ) -> tuple[ScoredTree, Sources]:
        text, num_nodes = session.text, round_.budget.num_nodes
        if text is None or not round_.has_text:
            sent = model.pruned_scored(num_nodes) if model is not None else NOTHING_SENT
            return sent, (DraftSources.MODEL,) * len(sent.tree)
        if model is None and round_.text_tree is not None and num_nodes <= _NUM_TRIAL_NODES:
            fused = round_.text_tree
        else:
            fused = text.fuse(ModelGuesser(model, early_rows) if model is not None else None, num_nodes)
        text.last = fused
        return fused.scored, fused.node_sources


def _tokens_by(tree: TokenTree, said: list[int]) -> int:
    """How many of the tokens `said` a round with `tree` would have brought."""
    return min(num_followed(tree, said) + 1, len(said))


def read_prompts(sessions: Iterable[Session]) -> bool:
    """Let text read a chunk of every prompt that it has not read; whether more is left."""
    unread = [session.text for session in sessions if session.text is not None and not session.text.has_read_prompt]
    for text in unread:
        text.read()
    return any(not text.has_read_prompt for text in unread)
