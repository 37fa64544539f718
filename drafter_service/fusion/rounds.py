"""The rounds of sessions: which sources take part in each, and the one tree that comes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeAlias

from drafter_service.fusion.learned import kind_of_round
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


class Rounds:
    """Begins and ends rounds. Rounds that text alone drafts at a better rate are drafted by text alone, and those in
    which text brings less than its work costs by the model alone (`drafter_service/worth.py`); the other catches up in
    the next round that it takes part in. With `asks_all_sources` no round leaves a source out.
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
            self._learn(session, last, session.token_ids[-num_new_tokens:], (now_ns - last.begun_ns) / 1e9)
        asks_model, text, choices = session.request.asks_model, session.text, session.choices
        has_drafted_alone = last is not None and not last.has_model
        # Text that drafted the last round alone goes on.
        is_sure = self._asks_all or not asks_model or has_drafted_alone
        has_text = text is not None and (is_sure or choices.text.is_worth_it(num_sharing=num_sharing))
        session.round = round_ = Round(budget, now_ns, asks_model, has_text)
        if text is None or not has_text:
            return round_
        text.begin()
        if asks_model:
            round_.text_tree = text.fuse(None, min(budget.num_nodes, _NUM_TRIAL_NODES))
            kind = kind_of_round(round_.text_tree.expected_tokens)
            round_.has_model = self._asks_all or choices.model.is_worth_it(kind)
        round_.text_ns = self._clock_ns() - now_ns
        return round_

    def _learn(self, session: Session, last: Round, said: list[int], round_s: float) -> None:
        choices, num_tokens = session.choices, len(said)
        choices.token_time.observe(round_s, num_tokens)
        if last.has_model:
            choices.ahead.observe(was_on=last.went_ahead, round_s=round_s, num_tokens=num_tokens)
        if session.text is not None:
            session.text.learn(said)
        if last.text_tree is not None and last.model_tree is not None:
            kind = kind_of_round(last.text_tree.expected_tokens)
            choices.model.observe(num_tokens - _tokens_by(last.text_tree.tree, said), last.model_ns / 1e9, kind)
            choices.text.observe(num_tokens - _tokens_by(last.model_tree.tree, said), last.text_ns / 1e9)

    def finish(self, session: Session) -> tuple[TokenTree, Sources]:
        """The round's tree within its budget, and the sources of each node."""
        round_ = session.round
        assert round_ is not None, "a round is under way"
        begun_ns = self._clock_ns()
        model = None
        if round_.has_model and session.model is not None:
            model = ModelGuesser(session.model.growing.scored(), session.model.early_rows)
            round_.model_tree = model.scored.pruned(round_.budget.num_nodes)
            round_.model_ns = begun_ns - round_.begun_ns - round_.text_ns
        round_.sent, node_sources = self._tree(session, round_, model)
        tree = round_.sent.tree
        if model is not None:
            node_sources = model.told_apart(tree, node_sources)
        round_.text_ns += self._clock_ns() - begun_ns if round_.has_text else 0
        return tree, node_sources

    def _tree(self, session: Session, round_: Round, model: ModelGuesser | None) -> tuple[ScoredTree, Sources]:
        text, num_nodes = session.text, round_.budget.num_nodes
        if text is None or not round_.has_text:
            sent = round_.model_tree or NOTHING_SENT
            return sent, (DraftSources.MODEL,) * len(sent.tree)
        if model is None and round_.text_tree is not None and num_nodes <= _NUM_TRIAL_NODES:
            text.last = round_.text_tree
        else:
            text.last = text.fuse(model, num_nodes)
        return text.last.scored, text.last.node_sources


def _tokens_by(tree: TokenTree, said: list[int]) -> int:
    """How many of the tokens `said` a round with `tree` would have brought."""
    return min(num_followed(tree, said) + 1, len(said))


def read_prompts(sessions: Iterable[Session]) -> None:
    """Let text read a chunk of every prompt that it has not read."""
    for session in sessions:
        if session.text is not None and not session.text.has_read_prompt:
            session.text.read()
