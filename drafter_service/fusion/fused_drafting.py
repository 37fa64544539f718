"""One request's drafting from text, alone or beside the draft model: one tree of all guesses.

A round has two parts. `begin` reads what was committed and looks up what text sources need; it does not depend on the
draft model. `fuse` asks all guessers, when the model's tree is there.
"""

from __future__ import annotations

from collections.abc import Sequence

from drafter_service.fusion.acceptance_estimate import AcceptanceEstimate, Judge
from drafter_service.fusion.model_guesses import ModelGuesser
from drafter_service.fusion.union import AllowedAfter, FusedTree, fuse, learn
from drafter_service.guesser import PathGuesser
from drafter_service.request import DraftRequest
from drafter_service.text.guessers import TextDrafting, TextResources

# Nodes worth less than this cost the verifier more than they can bring.
_MIN_NODE_VALUE = 0.002
_READ_TOKENS = 2048


class FusedDrafting:
    """Its text, what is peculiar to it, its last tree, and committed tokens that text has not read yet."""

    def __init__(
        self,
        resources: TextResources,
        request: DraftRequest,
        token_ids: Sequence[int],
        estimate: AcceptanceEstimate,
    ) -> None:
        self._text = TextDrafting(resources, request.sources, request.sampling)
        self._preference = request.preference
        self._judge = Judge(estimate)
        self._committed = token_ids  # the session's own, which grows
        self._num_prompt_tokens = len(token_ids)
        self._num_read = 0
        self._guessers: list[PathGuesser] = []
        self.last: FusedTree | None = None

    @property
    def has_read_prompt(self) -> bool:
        """Whether text has read all that was committed when it came."""
        return self._num_read >= self._num_prompt_tokens

    def read(self) -> None:
        """Read a chunk of what is committed."""
        chunk = self._committed[self._num_read : self._num_read + _READ_TOKENS]
        self._text.extend(chunk)
        self._num_read += len(chunk)

    def learn(self, said: Sequence[int]) -> None:
        """Learn from the verdict on the last tree, if there was one."""
        if self.last is not None:
            learn(self.last, said, self._judge)
            self.last = None

    def begin(self) -> None:
        """Read what is committed, and look things up."""
        while self._num_read < len(self._committed):
            self.read()
        self._guessers = self._text.guessers(self._num_read)

    def fuse(self, model: ModelGuesser | None, num_nodes: int) -> FusedTree:
        """The tree of all guesses; `model` has the draft model's, where it takes part: what is allowed only."""
        guessers = self._guessers if model is None else [model, *self._guessers]
        return fuse(guessers, self._judge, num_nodes, _MIN_NODE_VALUE, self._allowed_after())

    def _allowed_after(self) -> AllowedAfter | None:
        """What the request's grammar lets follow a path."""
        preference = self._preference
        return None if preference is None else lambda path: preference.allowed_after(self._committed, [path])[0]
